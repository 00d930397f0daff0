"""Serving: the Triton Inference Server inside the wheel nvidia-pytriton, run over our model repository.

server.py                        EmbeddedServer: start, await, stop
server_process.py                its process: tied to ours, watched, cleared away
model_processes.py               tells when a model process has died, which Triton does not
model_repository.py              which ensembles are built, which files are missing
installation.py                  the wheel's server, its backend folder, its environment
server_log.py                    Triton's log -> one sentence
embedded_backends/onnxruntime/   the backend the wheel lacks, copied into the backend folder
"""
