// Asks the worker for text, piece by piece, and shows it. Knows no model.
"use strict";
const form = document.forms[0];
const { prompt, tokens, temperature, topK, topP, seed, noSpecial, write, goOn, copy, stop, text } =
  form.elements;
const element = (id) => document.getElementById(id);
const SIMD = "AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw=="; // a program with a SIMD instruction
let worker, hasEnd, isStopped;

const ask = (message) => new Promise((resolve, reject) => {
  worker.onmessage = ({ data }) => {
    if ("error" in data) reject(Error(`Error: ${data.error}`));
    else if ("loaded" in data) element("progress").value = data.loaded;
    else resolve(data);
  };
  worker.onerror = reject;
  worker.postMessage(message);
});

async function load() {
  const simd = Uint8Array.from(atob(SIMD), (letter) => letter.charCodeAt(0));
  const lacking = ["Worker", "DecompressionStream", "WebAssembly"].find((name) => !window[name]) ??
    (WebAssembly.validate(simd) ? "" : "WebAssembly's SIMD");
  if (lacking)
    throw Error(`This browser lacks ${lacking}: use a current Firefox, Chrome, Edge or Safari`);
  const { textContent: weights, dataset } = element("weights");
  if (dataset.address && location.protocol === "file:")
    throw Error("A page on disk cannot read its model: run `python -m http.server` in the folder");
  worker = new Worker(URL.createObjectURL(new Blob([element("worker").textContent])));
  const address = new URL(dataset.address, location).href; // the worker has another base address
  const program = element("program").textContent;
  ({ hasEnd } = await ask({ task: "load", program, weights, address }));
  noSpecial.parentElement.hidden = !hasEnd;
  if (hasEnd) prompt.placeholder = "How the text begins, or nothing. Ctrl+Enter writes on.";
  element("weights").remove();
  show("Ready");
}

async function setPrompt() {
  text.innerHTML = "<b></b>";
  text.firstChild.textContent = prompt.value || (hasEnd ? "" : "\n");
  const { percent, unknown } = await ask({ task: "start", prompt: text.textContent,
    seed: seed.value, temperature: temperature.valueAsNumber, topK: topK.valueAsNumber || 0,
    topP: topP.value ? topP.valueAsNumber : Infinity, takesSpecials: !noSpecial.checked });
  const share = percent < 0.05 ? "Less than 0.1 %" : `${percent.toFixed(1)} %`;
  const lack = `${share} of the prompt is not in the model's vocabulary: `;
  element("warning").textContent = percent ? lack + unknown.map(visible).join(" ") : "";
}

const visible = (token) => token.replace(/[\p{C}\p{Z}]/gu, (character) =>
  `U+${character.codePointAt().toString(16).toUpperCase().padStart(4, "0")}`);

form.onsubmit = async (event) => {
  event.preventDefault();
  const most = tokens.valueAsNumber, start = performance.now();
  let nTokens = 0, piece, speed;
  isStopped = false;
  show("Writing", { isWriting: true });
  if (event.submitter !== goOn) await setPrompt();
  do {
    piece = await ask({ task: "write", most: most - nTokens });
    const isEndInSight = text.getBoundingClientRect().bottom <= innerHeight;
    text.append(piece.text);
    if (isEndInSight) scrollTo(0, document.body.scrollHeight);
    nTokens += piece.nTokens;
    speed = `at ${(1000 * nTokens / (performance.now() - start)).toFixed(1)} tokens per second`;
    element("speed").textContent = speed; // beside the status, which is read aloud
  } while (nTokens < most && !piece.isAtEnd && !isStopped);
  show(`${piece.isAtEnd ? "Ended" : "Written"} ${speed}`, { canGoOn: !piece.isAtEnd });
};

function show(status, { isWriting = false, canGoOn = false } = {}) {
  const isFocused = [write, goOn, stop].includes(document.activeElement);
  element("status").textContent = status;
  element("speed").textContent = "";
  text.setAttribute("aria-busy", isWriting);
  write.disabled = isWriting || element("progress").value < 1;
  goOn.disabled = !canGoOn;
  copy.disabled = isWriting || !text.firstChild;
  stop.hidden = !isWriting;
  if (isFocused) (isWriting ? stop : canGoOn ? goOn : write).focus(); // never on a disabled button
}

copy.onclick = async () => {
  try { await navigator.clipboard.writeText(text.textContent); }
  catch { getSelection().selectAllChildren(text); document.execCommand("copy"); }
  element("status").textContent = "Copied";
};
stop.onclick = () => (isStopped = true);
prompt.onkeydown = (event) => { if (event.ctrlKey && event.key === "Enter") write.click(); };
onunhandledrejection = ({ reason }) => show(reason.message);
load();
