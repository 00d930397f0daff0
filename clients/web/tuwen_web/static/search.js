// Makes the page quicker than its links are: each search fetches the page it would lead to and puts that one's results in
// place. And it searches by picture, which takes a script. Without it everything else works all the same.
"use strict";

const byId = (id) => document.getElementById(id);
const query = byId("query");
const file = byId("file");
const status = byId("status");
let underWay = null;
let retry = null;
let previewUrl = null;

/** Fetch a page and show its results. A later search ends an earlier one; `picture` is posted, and shown beside them. */
async function show(address, { picture = null, keepPlace = false, quietly = false } = {}) {
  underWay?.abort();
  clearTimeout(retry);
  const search = (underWay = new AbortController());
  const again = () => show(address, { picture, keepPlace: true, quietly: true });
  byId("results").setAttribute("aria-busy", String(!quietly));
  if (!quietly) status.textContent = status.dataset.searching;
  let page;
  try {
    const post = picture ? { method: "POST", body: picture, headers: { "Content-Type": "application/octet-stream" } } : {};
    const response = await fetch(address, { ...post, signal: search.signal });
    page = new DOMParser().parseFromString(await response.text(), "text/html");
    if (!page.getElementById("results")) throw new Error("not the search page");
  } catch {
    if (search.signal.aborted) return;
    tell(status.dataset.unreachable);
    retry = setTimeout(again, 3000);
    return;
  }
  take(page, picture);
  if (!keepPlace) scrollTo(0, 0);
  const seconds = Number(byId("results").dataset.retryAfterS);
  if (seconds) retry = setTimeout(again, seconds * 1000);
}

/** Put the parts of a fetched page that differ from search to search in place of ours. */
function take(page, picture) {
  for (const part of ["#results", "footer", ".language"]) {
    document.querySelector(part).replaceWith(page.querySelector(part));
  }
  document.title = page.title;
  const heading = byId("results").querySelector("h1, h2");
  status.textContent = heading ? heading.textContent : "";
  if (previewUrl) URL.revokeObjectURL(previewUrl);
  previewUrl = null;
  if (picture && byId("preview")) {
    const image = document.createElement("img");
    image.src = previewUrl = URL.createObjectURL(picture);
    image.alt = "";
    byId("preview").append(image);
  }
}

/** One sentence in place of results. */
function tell(sentence) {
  const notice = document.createElement("div");
  notice.className = "notice failed";
  notice.setAttribute("role", "alert");
  const text = document.createElement("p");
  text.className = "sentence";
  text.textContent = sentence;
  notice.append(text);
  byId("results").replaceChildren(notice);
  byId("results").removeAttribute("aria-busy");
  status.textContent = "";
}

function visit(address, options) {
  history.pushState(null, "", address);
  query.value = new URL(address, location.href).searchParams.get("q") ?? "";
  show(address, options);
}

function searchByPicture(picture) {
  if (!picture) return;
  if (picture.size > Number(file.dataset.maxBytes)) {
    underWay?.abort();
    clearTimeout(retry);
    tell(file.dataset.tooLarge);
    return;
  }
  query.value = "";
  const language = new URLSearchParams(location.search).get("lang");
  show(language ? `/?lang=${encodeURIComponent(language)}` : "/", { picture });
}

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  visit(`/?${new URLSearchParams(new FormData(event.target))}`);
});

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-search]");
  if (!link || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
  event.preventDefault();
  visit(link.href, { keepPlace: "keepPlace" in link.dataset });
});

addEventListener("popstate", () => {
  query.value = new URLSearchParams(location.search).get("q") ?? "";
  show(location.href, { keepPlace: true });
});

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input, textarea");
  if (event.key !== "/" || isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  query.focus();
  query.select();
});

file.addEventListener("change", () => {
  searchByPicture(file.files[0]);
  file.value = ""; // the same file may be chosen again
});

document.addEventListener("paste", (event) => {
  const picture = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
  if (!picture) return;
  event.preventDefault();
  searchByPicture(picture);
});

const holdsFiles = (event) => [...event.dataTransfer.types].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  byId("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) byId("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  byId("drop").hidden = true;
  if (!holdsFiles(event)) return;
  event.preventDefault();
  searchByPicture(event.dataTransfer.files[0]);
});

file.hidden = document.querySelector(".upload").hidden = false;
const seconds = Number(byId("results").dataset.retryAfterS);
if (seconds) retry = setTimeout(() => show(location.href, { keepPlace: true, quietly: true }), seconds * 1000);
