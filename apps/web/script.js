// Dividers, videos that play in step, and a page that outlives its app. Listens on the document:
// Gradio replaces what is in it.
(() => {
  // An app that was started again does not know what this page's fields offer, so the page loads
  // itself again. Gradio does that only where something was under way.
  const PAUSE = 3000; // milliseconds between two looks
  let known = "";

  const look = async () => {
    let id = "";
    try {
      const answer = await fetch("gradio_api/app_id", { signal: AbortSignal.timeout(10 * PAUSE) });
      if (answer.ok) id = await answer.text();
    } catch {} // nobody there
    if (id && known && id !== known) return location.reload();
    known ||= id;
    showAway(known && !id);
    setTimeout(look, PAUSE);
  };

  const showAway = (away) => {
    const shown = document.querySelector(".ac-away");
    if (!away) return shown?.remove();
    if (shown) return;
    const notice = document.createElement("div");
    notice.className = "ac-away ac-notice ac-warning";
    notice.setAttribute("role", "status");
    notice.textContent =
      "The app does not answer: it was ended, or cannot be reached. Start it again with accel app; " +
      "this page comes back by itself. What was finished is kept.";
    document.body.append(notice);
  };

  look();

  // Read before Gradio shows, and says that it shows, the first tab.
  window.tabBefore = sessionStorage.getItem("accel-tab");

  const videos = (box) => [...box.querySelectorAll("video")];
  const playersOf = (element) => element.closest?.("[data-players]");

  const keepInStep = (box) => {
    const [first, ...others] = videos(box);
    if (!first) return;
    for (const other of others) {
      if (Math.abs(other.currentTime - first.currentTime) > 0.06) other.currentTime = first.currentTime;
    }
    const seek = box.querySelector("[data-seek]");
    if (first.duration && document.activeElement !== seek) {
      seek.value = String(Math.round((1000 * first.currentTime) / first.duration));
    }
    if (!first.paused) requestAnimationFrame(() => keepInStep(box));
  };

  const play = (box, on) => {
    const button = box.querySelector("[data-play]");
    const all = videos(box);
    if (on) {
      for (const video of all.slice(1)) video.currentTime = all[0].currentTime;
      Promise.all(all.map((video) => video.play())).then(() => keepInStep(box), () => play(box, false));
    } else {
      for (const video of all) video.pause();
    }
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(on));
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-play]");
    if (button) play(playersOf(button), button.getAttribute("aria-pressed") !== "true");
  });

  document.addEventListener("input", (event) => {
    const target = event.target;
    const slider = target.closest?.("[data-slider]");
    if (slider) slider.style.setProperty("--cut", `${target.value}%`);
    const box = playersOf(target);
    if (!box) return;
    if (target.matches("[data-seek]")) {
      for (const video of videos(box)) video.currentTime = (target.value / 1000) * (video.duration || 0);
    }
    if (target.matches("[data-speed]")) {
      for (const video of videos(box)) video.playbackRate = Number(target.value);
    }
  });
})();
