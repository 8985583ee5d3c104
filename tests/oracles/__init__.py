"""What Llama 4 is, three times over: Hugging Face's code, Meta's code, and a slow obvious numpy.

The three share one set of tiny random weights under Hugging Face's names, so each can be held against the others
(`test_oracles_agree.py`), and ours (`ours.py`) against any of them. The oracles import nothing of the product.
"""
