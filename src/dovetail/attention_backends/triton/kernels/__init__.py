"""The kernels. Importing one imports Triton; whether they are interpreted is decided then.

What all of them call by the same name:

==================================  ================================================================
``q_ptr``, ``q_token``, ``q_head``  (T, H, KEY_SIZE) with strides; k and v of the step alike
``out_ptr``                         (T, H, VALUE_SIZE)
``keys_ptr``, ``values_ptr``        the cache of the layer (``cache.py``)
``key_scales_ptr``, ...             its scales, where entries are coded
``slopes_ptr``                      (H,) ALiBi's slopes in base 2, where ALIBI
``starts_ptr``                      (R + 2,) where the rows begin; then the tokens of no row; then T
``lens_ptr``                        (R,) lengths of the sequences; 0 where a row has no tokens
``meta_ptr``                        its first number is the width of the block tables
``tables_ptr``                      (R, width) block tables
``KEY_WIDTH``, ``VALUE_WIDTH``      sizes filled up to powers of two
``BLOCK``                           positions of a KV block
``FORMAT``, ``NATIVE``, ``DOT``     how entries of the cache are read: see ``codes.decoded``
``SCALE``, ``CAP``                  of the scores: in base 2, unless they are capped; no cap: 0
``WINDOW``                          of the layer; 0: none
``FEW``                             rows with so many query tokens, or fewer, belong to ``decode``
``ALONE``                           token i is that of row i, or of no row, and then it gets zeros
``ROWS``, ``TILE``                  query vectors, and positions, that are multiplied at a time
==================================  ================================================================
"""
