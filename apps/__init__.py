"""Programs built on the suite: the command line, the renderer, the contact sheet, the demo."""
