"use strict";
// columns sort by click or key; what is absent stays last
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.kind === "text" ? "ascending" : "descending";
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach(one => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const value = row => row.cells[column].dataset.value;
    const compare = head.dataset.kind === "text" ? (a, b) => a.localeCompare(b, undefined, {numeric: true}) : (a, b) => a - b;
    const rows = [...table.tBodies[0].rows].sort((a, b) =>
      (value(a) === "") - (value(b) === "") || sign * compare(value(a), value(b)));
    table.tBodies[0].append(...rows);
  }));
}

const toolbar = document.querySelector(".toolbar");
if (toolbar) {
  const page = document.documentElement, dialog = document.querySelector("dialog");
  const images = [...document.querySelectorAll(".shot")], home = toolbar.parentElement;
  let open = 0;
  const show = index => {
    open = (index + images.length) % images.length;
    const copy = images[open].cloneNode(true);
    copy.querySelector("button").replaceWith(copy.querySelector(".stack"));
    dialog.querySelector(".stage").replaceChildren(copy);
  };
  toolbar.addEventListener("input", event => {
    if (event.target.type === "radio") page.dataset.view = event.target.value;
    else page.style.setProperty("--opacity", event.target.value / 100);
  });
  images.forEach((image, index) => image.querySelector("button").addEventListener("click", () => {
    show(index);
    dialog.prepend(toolbar);  // the same switches serve both places
    dialog.showModal();
  }));
  dialog.addEventListener("close", () => home.prepend(toolbar));
  dialog.addEventListener("click", event => {
    const step = event.target.dataset.step;
    if (step) show(open + Number(step));
    else if (event.target === dialog || event.target.dataset.close !== undefined) dialog.close();
  });
  dialog.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (step && event.target.tagName !== "INPUT") show(open + step);
  });
}
