"""LangChain's standard tests are partly async and expect pytest-asyncio to run them."""


def pytest_configure(config):
    if config.pluginmanager.hasplugin("asyncio"):
        config.option.asyncio_mode = "auto"
