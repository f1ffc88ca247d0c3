"""VBench (Huang et al. 2024, arXiv 2311.17982): its prompts, its protocol, its code.

Prompts come from its own file, videos from the renderer, scores from its own code in its own
interpreter; they are normalised and weighted here.

Reading order: suite (what is asked), plan, folder (generate, check, judge), official (the driver
that VBench's interpreter runs), score (the published normalisation). Nothing of VBench is copied:
the prompt file comes from the user's copy.
"""
