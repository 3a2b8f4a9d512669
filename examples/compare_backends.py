"""Ask every installed backend the same question, and compare answers and speed.

Each backend needs its extra: pip install "phirt[cpu,genai,openvino,mlx,torch]".
"""

import phirt

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

for backend in ("onnxruntime", "openvino", "onnxruntime-genai", "mlx", "transformers"):
    try:
        model = phirt.load(backend=backend)
    except phirt.BackendError as error:
        print(f"{backend:18} {error}")
        continue
    with model:
        answer = model.generate(QUESTION, max_new_tokens=24)
        speed = answer.timings.decode_tokens_per_s
        rate = "" if speed is None else f"{speed:.0f} tokens/s"
        print(f"{backend:18} {model.precision:5} {rate:14} {answer.text}")
