// The exported backbone in onnxruntime-web, and the loop that answers: prompt, token, token, ...

import { editMask } from "./mask.mjs";

/**
 * What the backbone runs on: WebGPU where the browser has it for a graphics processor, else WebAssembly.
 * @param wanted "webgpu" or "wasm" asks for that one; "webgpu" then takes a processor, too, that software imitates.
 * @returns {{provider: string, why: string}} why: what speaks against WebGPU, "" for nothing.
 */
export async function chooseProvider(wanted, gpu = navigator.gpu) {
  if (wanted && !["webgpu", "wasm"].includes(wanted)) {
    throw new Error(`on=${wanted} is nothing that the page runs on; leave it out, or use on=webgpu or on=wasm.`);
  }
  const wasm = (why) => ({ provider: "wasm", why });
  if (wanted === "wasm") return wasm("the address asks for it");
  if (!gpu) return wasm("this browser has no WebGPU");
  let adapter;
  try {
    adapter = await gpu.requestAdapter();
  } catch (error) {
    return wasm(`WebGPU failed: ${error.message}`);
  }
  if (!adapter) return wasm("WebGPU finds no graphics processor");
  if (adapter.info?.isFallbackAdapter && !wanted) return wasm("software imitates the graphics processor, which is slower");
  return { provider: "webgpu", why: "" };
}

/** onnxruntime-web for a provider, in the smaller of its builds. */
export async function loadRuntime(vendor, provider) {
  const ort = await import(`${vendor}/ort.${provider}.bundle.min.mjs`);
  // The module's code is in the bundle, its WebAssembly beside it.
  const file = provider === "webgpu" ? "ort-wasm-simd-threaded.asyncify.wasm" : "ort-wasm-simd-threaded.wasm";
  ort.env.wasm.wasmPaths = { wasm: `${vendor}/${file}` };
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  return ort;
}

/** A file's bytes, with a report of how much of it is there. */
export async function download(url, report = () => {}) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be fetched (${response.status} ${response.statusText}).`);
  const total = Number(response.headers.get("content-length"));
  const parts = [];
  let size = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    report((size += value.length), total);
  }
  if (total && size !== total) throw new Error(`${url} was cut off: ${size} of ${total} bytes. Fetch it again.`);
  return new Blob(parts).arrayBuffer();
}

export class Backbone {
  /**
   * A backbone that runs; where WebGPU does not run it, WebAssembly does.
   * @param load gives the runtime of a provider. @param chosen of chooseProvider.
   * @param description backbone.json. @param graph bytes of the ONNX file.
   */
  static async open(load, { provider, why }, description, graph) {
    if (description.format !== "peft_reft.backbone" || description.version !== 1) {
      throw new Error("backbone.json describes no backbone of this version.");
    }
    if (description.baked || !description.cache || description.cache_dtype !== "float32") {
      throw new Error(
        "This page runs backbones that take adapters, with a cache in float32: `python -m peft_reft export BASE OUT` " +
          "without --bake and --no-cache, and with --dtype int4, int8 or float32.",
      );
    }
    try {
      const ort = await load(provider);
      // WebAssembly has no fast product of weights with few bits: they are worked out when the file is loaded.
      const extra = provider === "wasm" ? { session: { disable_quant_qdq: "1" } } : {};
      const session = await ort.InferenceSession.create(graph, { executionProviders: [provider], extra });
      return new Backbone(ort, description, session, provider, why);
    } catch (error) {
      if (provider === "wasm") throw error;
      return Backbone.open(load, { provider: "wasm", why: `WebGPU failed: ${error.message}` }, description, graph);
    }
  }

  constructor(ort, description, session, provider, why) {
    Object.assign(this, { ort, description, session, provider, why });
  }

  /** One run of the graph; where it fails, what to do. */
  async forward(inputs) {
    try {
      return await this.session.run(inputs);
    } catch (error) {
      const hint = this.provider === "webgpu" ? " Add ?on=wasm to the address of the page to do without WebGPU." : "";
      throw new Error(`The backbone failed on ${this.provider}: ${error.message}.${hint}`);
    }
  }

  /**
   * Greedy tokens behind a prompt, as they come.
   * @param ids token ids of the prompt. @param edits of readEdits, null for the backbone alone.
   * @param inputs of fitEdits. @param strength what the mask is multiplied with. @param penalty above 1 for less
   * repetition. @param most how many tokens.
   */
  async *answer(ids, edits, inputs, { strength = 1, penalty = 1, most = 60 } = {}) {
    const { ort, description } = this;
    const tensor = (type, values, dims) => new ort.Tensor(type, values, dims);
    const integers = (values) => BigInt64Array.from(values, BigInt);
    const { cache, blocks, width, vocabulary } = description;
    const room = (description.max_columns ?? Infinity) - ids.length;
    if (room < 1) throw new Error(`The prompt has ${ids.length} tokens; the backbone takes rows of ${description.max_columns}.`);
    const { rank, groups } = inputs ?? { rank: description.max_rank ?? 1, groups: description.max_groups ?? 1 };
    const shape = [blocks.length, groups, rank];
    const zeros = (...dims) => new Float32Array(dims.reduce((size, dim) => size * dim, 1));
    const adapter = {
      down: tensor("float32", inputs?.down ?? zeros(...shape, width), [...shape, width]),
      bias: tensor("float32", inputs?.bias ?? zeros(...shape), shape),
      up: tensor("float32", inputs?.up ?? zeros(...shape, width), [...shape, width]),
    };
    let past = {};
    cache.forEach(({ heads, key, value }, i) => {
      past[`past.${i}.key`] = tensor("float32", zeros(0), [1, heads, 0, key]);
      past[`past.${i}.value`] = tensor("float32", zeros(0), [1, heads, 0, value]);
    });
    const seen = new Set(ids);
    let columns = ids;
    for (let generated = 0; generated < Math.min(most, room); generated++) {
      const outputs = await this.forward({
        input_ids: tensor("int64", integers(columns), [1, columns.length]),
        attention_mask: tensor("int64", integers(Array(ids.length + generated).fill(1)), [1, ids.length + generated]),
        edit_mask: tensor("float32", maskOf(edits, ids.length, generated, columns.length, groups, strength), [
          1, columns.length, groups,
        ]),
        ...adapter,
        ...past,
      });
      const logits = (await outputs.logits.getData()).slice(-vocabulary);
      for (const id of seen) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
      const token = logits.reduce((best, logit, id) => (logit > logits[best] ? id : best), 0);
      if (description.end_tokens.includes(token)) return;
      yield token;
      seen.add(token);
      columns = [token];
      past = Object.fromEntries(Object.keys(past).map((name) => [name, outputs[name.replace("past", "present")]]));
    }
  }
}

/** The mask of a forward's columns, which are the last ones of the row, with the strength and the graph's groups. */
function maskOf(edits, prompt, generated, columns, groups, strength) {
  const result = new Float32Array(columns * groups);
  if (!edits) return result;
  const { mask, groups: own } = editMask(edits.positions, edits.shareWeights, prompt, generated);
  const start = prompt + generated - columns;
  for (let column = 0; column < columns; column++) {
    for (let group = 0; group < own; group++) {
      result[column * groups + group] = strength * mask[(start + column) * own + group];
    }
  }
  return result;
}
