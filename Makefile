# SPDX-License-Identifier: MIT
# actpatch: `make` builds the program, `make demo` shows it, `make test` checks it.
#
#   make [OPENMP=0] [CC=clang] [CFLAGS=-O2]    ./actpatch
#   make lib                                   ./libactpatch.so, for Python's ctypes and other programs
#   make test [MODEL=gpt2.bin]                 all that needs only cc, make and python3
#   make portability [ROWS="s390x gcc"]        other compilers, processors and systems, as far as they are here
#   make install [PREFIX=/usr/local] [DESTDIR=]

CC ?= cc
CFLAGS ?= -O2
PYTHON ?= python3
PREFIX ?= /usr/local
DESTDIR ?=
RUNS ?= 20000
SEED ?= 1
N ?= 50

# -std=gnu99 and not c99: only outside the ISO modes gcc fuses multiply and add, which is half the speed.
# The kernels for AVX2 and AVX-512 are chosen at run time, so -march=native gains nothing.
STD = -std=gnu99
WARN = -Wall -Wextra -Wshadow -Wconversion -Wstrict-prototypes -Wmissing-prototypes -Wcast-qual -Wdouble-promotion

# OpenMP where the compiler can link it; OPENMP=0 for libc and libm alone.
OPENMP ?= $(shell echo 'int main(void) { return 0; }' | $(CC) -fopenmp -x c - -o /dev/null 2>/dev/null && echo 1 || echo 0)
ifeq ($(OPENMP),1)
OMP = -fopenmp
endif
BUILD = $(CC) $(STD) $(CFLAGS) $(WARN) $(OMP) $(CPPFLAGS) -DACTPATCH_PREFIX='"$(PREFIX)"'

all: actpatch

actpatch: patch.c patch.h Makefile
	$(BUILD) patch.c -o $@ $(LDFLAGS) -lm

lib: libactpatch.so
libactpatch.so: patch.c patch.h Makefile
	$(BUILD) -DPATCH_NO_MAIN -fPIC -shared patch.c -o $@ $(LDFLAGS) -lm

# The main job on the bundled model. Without python3 the committed flat file serves.
demo: actpatch
	@CC="$(CC)" PYTHON="$(PYTHON)" sh tests/demo.sh

test: actpatch
	@MODEL="$(MODEL)" CC="$(CC)" $(PYTHON) tests/run.py

# The fast half: what catches a wrong character in the core.
test-core: actpatch
	@CC="$(CC)" $(PYTHON) tests/run.py --core

# Beside TransformerLens itself, at GPT-2 small's size and on random models: PYTHON must have torch,
# transformers and transformer-lens (versions in tests/requirements.txt).
test-reference: actpatch
	@$(PYTHON) tests/reference.py $(ARGS)

# Analyzers, and what they may say.
analyze:
	@$(PYTHON) tests/analyze.py $(TOOLS)

# Random wrong tokens in the core, each held against test-core.
mutate:
	@CC="$(CC)" $(PYTHON) tests/mutate.py --seed $(SEED) --count $(N)

# Lines and branches of patch.c that the tests run, by gcc's counts.
coverage:
	@CC="$(CC)" $(PYTHON) tests/coverage.py

fuzz: actpatch
	@$(PYTHON) tests/fuzz.py --runs $(RUNS) $(TARGETS)

test-exhaustive: actpatch
	@CC="$(CC)" $(PYTHON) tests/test_kernels.py --exhaustive

# The pictures of README.md, into tests/pictures.
pictures: actpatch
	@sh tests/pictures.sh

bench: actpatch
	@CC="$(CC)" $(PYTHON) tests/bench.py

portability:
	@$(PYTHON) tests/portability.py $(ROWS)

install: actpatch lib
	mkdir -p $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/include/actpatch $(DESTDIR)$(PREFIX)/lib/pkgconfig \
	  $(DESTDIR)$(PREFIX)/share/actpatch
	cp actpatch $(DESTDIR)$(PREFIX)/bin/
	cp patch.h $(DESTDIR)$(PREFIX)/include/actpatch/
	cp libactpatch.so $(DESTDIR)$(PREFIX)/lib/
	cp tests/tiny/model.bin $(DESTDIR)$(PREFIX)/share/actpatch/
	printf 'prefix=%s\nName: actpatch\nDescription: activation patching for GPT-2\nVersion: %s\nLibs: -L$${prefix}/lib -lactpatch -lm\nCflags: -I$${prefix}/include/actpatch\n' \
	  '$(PREFIX)' "$$(sed -n 's/#define PATCH_VERSION "\(.*\)"/\1/p' patch.h)" \
	  > $(DESTDIR)$(PREFIX)/lib/pkgconfig/actpatch.pc

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/actpatch $(DESTDIR)$(PREFIX)/include/actpatch/patch.h \
	  $(DESTDIR)$(PREFIX)/lib/libactpatch.so $(DESTDIR)$(PREFIX)/share/actpatch/model.bin \
	  $(DESTDIR)$(PREFIX)/lib/pkgconfig/actpatch.pc
	rmdir $(DESTDIR)$(PREFIX)/include/actpatch $(DESTDIR)$(PREFIX)/share/actpatch 2>/dev/null || true

clean:
	rm -rf actpatch libactpatch.so build

.PHONY: all lib demo test test-core test-reference test-exhaustive fuzz coverage mutate analyze portability pictures bench \
  install uninstall clean
