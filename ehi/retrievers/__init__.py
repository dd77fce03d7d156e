"""An index behind the interfaces of LangChain, LlamaIndex and Haystack.

    text_records       documents, their texts and metadata, in an index folder
    metadata_filters   one form of all their filters -> `Index.where`, or row by row
    langchain_store    EhiRetriever, EhiVectorStore     extra: langchain
    llama_index_store  EhiRetriever, EhiVectorStore     extra: llama-index
    haystack_store     EhiTextRetriever, EhiEmbeddingRetriever, EhiDocumentStore
                                                        extra: haystack

Each needs NumPy, its framework and, for search by the index's own encoder, tokenizers
and safetensors; none needs JAX.
"""


def absent(framework, extra):
    """What stands for the classes of a framework that is not installed.

    >>> absent("LangChain", "langchain")()
    Traceback (most recent call last):
    ImportError: this needs LangChain: python -m pip install 'ehi[langchain]'
    """

    class Absent:
        def __new__(cls, *_, **__):
            raise ImportError(
                f"this needs {framework}: python -m pip install 'ehi[{extra}]'"
            )

    return Absent
