"""The benchmark suite, imported as `srcfast_benchmarks`: one file a question, results beside them."""
