// Runs the model beside the page, and sends text when asked. Knows no document.
"use strict";
const PATIENCE = 30; // milliseconds between two pieces of text
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
let model;

const memory = (address, n) => new Uint8Array(model.memory.buffer, address, n);

function unpacked(base64) {
  const pieces = [], length = 1 << 20; // letters at once; 4 of them are 3 bytes
  const code = (letter) => letter.charCodeAt(0);
  for (let at = 0; at < base64.length; at += length)
    pieces.push(Uint8Array.from(atob(base64.slice(at, at + length)), code));
  return new Response(new Blob(pieces).stream().pipeThrough(new DecompressionStream("gzip")));
}

// `program` and `weights` are gzip in base 64; large weights are at an address instead.
async function load({ program, weights, address }) {
  model = (await WebAssembly.instantiate(await unpacked(program).arrayBuffer())).instance.exports;
  const response = weights ? unpacked(weights) : await fetch(address);
  if (!response.ok) throw Error(`${address}: ${response.status} ${response.statusText}`);
  const reader = response.body.getReader(), size = model.model_bytes();
  let n = 0;
  for (let piece; !(piece = await reader.read()).done; postMessage({ loaded: n / size })) {
    if (n + piece.value.length > size) throw Error("the weights are another model's");
    memory(model.model_address() + n, piece.value.length).set(piece.value);
    n += piece.value.length;
  }
  if (n < size) throw Error("the weights are not complete");
  model.widen_halves();
  postMessage({ hasEnd: model.has_end() });
}

function copyIn(text) {
  const bytes = new TextEncoder().encode(text);
  if (bytes.length > model.max_input()) throw Error("the prompt is too long");
  memory(model.input_address(), bytes.length).set(bytes);
  return bytes.length;
}

function start({ prompt, seed, temperature, topK, topP, takesSpecials }) {
  if (!model.set_seed(copyIn(seed))) throw Error("the seed is too large");
  const percent = model.start(copyIn(prompt), temperature, topK, topP, takesSpecials);
  const numbers = new Uint32Array(model.memory.buffer, model.counts_of_unknown(), 15);
  const token = (i) => decoder.decode(memory(numbers[3 * i], numbers[3 * i + 1]));
  postMessage({ percent, unknown: [0, 1, 2, 3, 4].map(token).filter(Boolean) });
}

// Sends the text of up to `most` tokens, as far as they come in a short time.
function write({ most }) {
  const end = performance.now() + PATIENCE;
  let text = "", nTokens = 0;
  for (; nTokens < most && !model.is_at_end() && performance.now() < end; nTokens++) {
    const n = model.next_token();
    text += decoder.decode(memory(model.text_address(), n));
  }
  if (model.is_broken()) throw Error("the model's numbers are not finite");
  postMessage({ text, nTokens, isAtEnd: model.is_at_end() });
}

onmessage = ({ data }) =>
  Promise.resolve(data)
    .then({ load, start, write }[data.task])
    .catch((error) => postMessage({ error: error.message }));
