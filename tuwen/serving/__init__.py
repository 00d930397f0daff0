"""Serving: the Triton Inference Server inside the wheel nvidia-pytriton, run over our model repository.

    server.py                        EmbeddedServer: start, await, stop
    model_repository.py              which ensembles are built, which files are missing
    installation.py                  the wheel's server, its backend folder, its environment
    server_log.py                    Triton's log -> one sentence
    embedded_backends/onnxruntime/   the backend the wheel lacks, copied into the backend folder
"""
