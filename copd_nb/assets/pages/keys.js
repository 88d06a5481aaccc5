// Names for controls that have none, and arrow keys between the tokens of a strip. Loaded by copd_nb.view.pages.
function name(root) {
  for (const words of root.querySelectorAll(".widget-label, .widget-label-basic")) {
    const label = words.textContent.trim();
    if (!label) continue;
    const parts = words.parentElement.querySelectorAll(".noUi-handle, input, select, .widget-readout");
    for (const part of parts) if (!part.getAttribute("aria-label")) part.setAttribute("aria-label", label);
  }
}

const ICONS = {play: "play or pause", pause: "play or pause", stop: "back to the start", retweet: "repeat"};

function icons(root) {
  for (const button of root.querySelectorAll("button")) {
    if (button.textContent.trim() || button.getAttribute("aria-label") || button.title) continue;
    const icon = button.querySelector("i")?.className.match(/fa-([a-z]+)/)?.[1];
    if (icon) button.setAttribute("aria-label", ICONS[icon] ?? icon);
  }
}

function move(event) {
  const button = event.target.closest(".copd-strip button");
  const by = {ArrowRight: 1, ArrowLeft: -1, Home: -1e9, End: 1e9}[event.key];
  if (!button || !by) return;
  event.preventDefault();
  event.stopPropagation();
  const all = [...button.closest(".copd-strip").querySelectorAll("button")], at = all.indexOf(button);
  const next = all[Math.max(0, Math.min(all.length - 1, at + by))];
  next.focus();
  if (next !== button) next.click();
}

export default {render({el}) {
  el.hidden = true;
  let root = null, seen = null;
  const begin = () => {
    root = el.closest(".copd-live");
    if (!root) return requestAnimationFrame(begin);
    root.addEventListener("keydown", move, true);
    seen = new MutationObserver(() => { name(root); icons(root); });
    seen.observe(root, {childList: true, subtree: true});
    name(root);
    icons(root);
  };
  begin();
  return () => { seen?.disconnect(); root?.removeEventListener("keydown", move, true); };
}};
