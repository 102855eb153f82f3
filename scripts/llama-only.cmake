# llama-cpp-python switches llama.cpp's "common" library on, which its Python package never loads.
# Included by CMake right after llama.cpp's project(), this takes it out of the build again
# (with LLAVA_BUILD=OFF: 74 files to compile instead of 178).
set(LLAMA_BUILD_COMMON OFF)
