"""Programs that repeat the experiments of the Flora paper (Hao, Cao, Mou, ICML 2024, arXiv 2402.03293)."""
