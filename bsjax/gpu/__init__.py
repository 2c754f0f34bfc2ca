"""What the GPU kernels share, whether written in Pallas or in Triton. Needs neither.

configurations          GPUs; tables of block sizes, warps and pipeline stages of prefill
decode_configurations   block sizes, warps and pipeline stages of decode
keys                    the keys of a schedule as kernels read them
pieces                  how the channels of a head are divided into blocks
parts                   the combination of split tiles
"""
