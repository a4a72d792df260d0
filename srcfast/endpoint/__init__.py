"""Ask language models behind an OpenAI-compatible endpoint: vLLM, SGLang, llama.cpp, or a provider's."""
