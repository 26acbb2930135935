"""One runtime of `cpu.py`, in a process and an environment of its own: loads a model, then runs what it is sent.

Started as `PYTHON cpu_runtime.py RUNTIME MODEL THREADS NEW_TOKENS`. It prints a line of JSON when the model is loaded;
then for each line of token ids (JSON) on its standard input it generates greedily and prints how long that took:
`first_s` to the first token and `steps_s` between tokens. It imports nothing of this project except for `ours-*`, and
runs on Python 3.11.
"""

import importlib.metadata
import itertools
import json
import sys
import time

# This folder is no package; its `kernels.py` would be taken for Hugging Face's package of that name.
sys.path.pop(0)


def transformers_eager(model, threads, new):
    import torch
    import transformers

    torch.set_num_threads(threads)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()

    def run(prompt):
        times = []

        class Stopwatch(transformers.StoppingCriteria):
            def __call__(self, input_ids, *_, **__):
                times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with torch.no_grad():
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([Stopwatch()]),
            )
        return [moment - start for moment in times]

    return run, {name: importlib.metadata.version(name) for name in ("torch", "transformers")}


def llama_cpp(model, threads, new):
    import llama_cpp

    loaded = llama_cpp.Llama(model, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)

    def run(prompt):
        loaded.reset()  # nothing of the prompt before may be found again
        start = time.perf_counter()
        times = []
        generated = loaded.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        for _ in zip(range(new), generated, strict=False):
            times.append(time.perf_counter() - start)
        return times

    return run, {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}


def openvino(model, threads, new):
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    # This backend keeps no prefixes of earlier prompts.
    pipe = genai.LLMPipeline(model, "CPU", ATTENTION_BACKEND="SDPA", INFERENCE_NUM_THREADS=threads)
    config = genai.GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, ignore_eos=True)

    def run(prompt):
        ids = ov.Tensor(np.array([prompt], np.int64))
        inputs = genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(prompt)), np.int64)))
        start = time.perf_counter()
        times = []

        class Watch(genai.StreamerBase):
            def write(self, token):
                count = len(token) if isinstance(token, list) else 1
                times.extend([time.perf_counter() - start] * count)
                return genai.StreamingStatus.RUNNING

            def end(self):
                pass

        pipe.generate(inputs, config, Watch())
        return times

    return run, {name: importlib.metadata.version(name) for name in ("openvino", "openvino-genai")}


def ours(mode):
    def start(model, threads, new):
        del threads  # XLA takes every core that the process may run on
        from aot_cache.guard import CompileCounter, forbid_compilation

        counter = CompileCounter()
        forbid_compilation()
        from elastic_jax import ElasticMistral
        from elastic_jax.requests import GenerateRequest, SamplingParams

        loaded = ElasticMistral.load(model, mode=mode)
        engine = loaded.engine

        def run(prompt):
            start = time.perf_counter()
            engine.submit(GenerateRequest(tuple(prompt), new, SamplingParams(), frozenset(), 1, None))
            times = []
            while engine.busy:
                times += [time.perf_counter() - start for _ in engine.step()]
            if counter.count():
                raise SystemExit(f"{counter.count()} compile events")
            return times

        info = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
        return run, {**info, "provisional": loaded.plan.provisional}

    return start


RUNTIMES = {
    "transformers": transformers_eager,
    "llama.cpp": llama_cpp,
    "openvino": openvino,
    "ours-S": ours("S"),
    "ours-XL": ours("XL"),
}


def main():
    name, model, threads, new = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries print must not be taken for an answer
    start = time.perf_counter()
    run, versions = RUNTIMES[name](model, threads, new)
    print(json.dumps({"load_s": time.perf_counter() - start, "versions": versions}), file=answer, flush=True)
    for line in sys.stdin:
        times = run(json.loads(line))
        steps = [after - before for before, after in itertools.pairwise(times)]
        print(json.dumps({"first_s": times[0], "steps_s": steps}), file=answer, flush=True)


if __name__ == "__main__":
    main()
