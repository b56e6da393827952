"""A recorded call, made again: its parameter blocks with other addresses in them, and its kernels."""
from cpython.buffer cimport PyBUF_STRIDES, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport int64_t
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.stdlib cimport getenv

cdef enum:
    MAX_AXES = 8
    MAX_ARRAYS = 32


cdef bytes _variable(const char* name):
    cdef const char* value = getenv(name)
    return <bytes>value if value != NULL else None


def settings():
    """What the environment says of instruction set and backend; a twentieth of the time that os.environ takes."""
    return _variable("MHA_CPU_ISA"), _variable("MHA_BACKEND")


def signature(tuple arrays not None, type array_type not None):
    """Equal for arrays of equal dtypes, shapes and strides; None if one is unaligned or not exactly of `array_type`."""
    cdef int64_t sizes[MAX_ARRAYS * (2 * MAX_AXES + 1)]
    cdef Py_buffer view
    cdef Py_ssize_t filled = 0, i
    cdef list parts = []
    if len(arrays) > MAX_ARRAYS:
        return None
    for x in arrays:
        if type(x) is not array_type:
            return None
        PyObject_GetBuffer(x, &view, PyBUF_STRIDES)
        if view.ndim > MAX_AXES or view.len == 0 or <size_t>view.buf % <size_t>view.itemsize != 0:
            PyBuffer_Release(&view)
            return None
        sizes[filled] = view.ndim
        for i in range(view.ndim):
            sizes[filled + 1 + i] = view.shape[i]
            sizes[filled + 1 + view.ndim + i] = view.strides[i]
            if view.strides[i] % view.itemsize != 0:
                PyBuffer_Release(&view)
                return None
        filled += 1 + 2 * view.ndim
        PyBuffer_Release(&view)
        parts.append(x.dtype)
    parts.append((<char*>sizes)[:filled * sizeof(int64_t)])
    return tuple(parts)


cdef struct Patch:
    int64_t launch          # which block
    int64_t field           # at which byte of it
    int64_t buffer          # whose address: the arguments', then the outputs', then the scratch memory's
    int64_t displacement    # plus so many bytes


cdef class Recording:
    """The launches of one call.

    Parameters
    ----------
    launches : list of (kernel, bytes, bool)
        Entry function, parameter block, whether it computes in double precision.
    patches : list of (int, int, int, int)
        Launch, byte of its block, buffer and displacement, in the order of the launches. Buffers are the arguments, the
        outputs and the scratch memory.
    arguments : int
        How many arrays the call takes.
    allocate : list of callables
        Each makes one output.
    results : list of (int, callable or None), or None for one that is None
        Index of an output, and what makes the result of it, None if it is the result.
    single : bool
        Whether the call returns its only result, not a tuple.
    scratch_bytes : int
    """
    cdef list launches, allocate, results
    cdef Patch* patches
    cdef Py_ssize_t count, arguments, scratch_bytes
    cdef bint single

    def __cinit__(self, list launches not None, list patches not None, Py_ssize_t arguments, list allocate not None,
                  list results not None, bint single, Py_ssize_t scratch_bytes):
        cdef Py_ssize_t i
        self.launches, self.allocate, self.results = launches, allocate, results
        self.arguments, self.single, self.scratch_bytes = arguments, single, scratch_bytes
        self.count = len(patches)
        if arguments + len(allocate) + 1 > MAX_ARRAYS:
            raise ValueError(f"{arguments} arguments and {len(allocate)} outputs: more than {MAX_ARRAYS - 1}")
        self.patches = <Patch*>PyMem_RawMalloc(max(self.count, 1) * sizeof(Patch))
        if self.patches == NULL:
            raise MemoryError
        for i in range(self.count):
            launch, field, buffer, displacement = patches[i]
            if not 0 <= field <= len(launches[launch][1]) - 8:
                raise ValueError(f"byte {field} is outside the block of launch {launch}")
            self.patches[i] = Patch(launch, field, buffer, displacement)

    def __dealloc__(self):
        PyMem_RawFree(self.patches)

    def __call__(self, tuple arrays not None):
        """The results for arrays of the recorded call's signature."""
        cdef char* address[MAX_ARRAYS]
        cdef Py_buffer view
        cdef Py_ssize_t i, done = 0, used = 0
        cdef char* scratch
        cdef bytearray block
        cdef list outputs = [make() for make in self.allocate]
        if len(arrays) != self.arguments:
            raise ValueError(f"{len(arrays)} arrays for a call recorded with {self.arguments}")
        for held in (arrays, outputs):
            for x in held:
                PyObject_GetBuffer(x, &view, PyBUF_STRIDES)
                address[used] = <char*>view.buf
                PyBuffer_Release(&view)
                used += 1
        scratch = <char*>PyMem_RawMalloc(self.scratch_bytes + 64)
        if scratch == NULL:
            raise MemoryError(f"{self.scratch_bytes} bytes of scratch memory")
        address[used] = <char*>((<size_t>scratch + 63) // 64 * 64)
        try:
            for i in range(len(self.launches)):
                kernel, template, double = <tuple>self.launches[i]
                block = bytearray(template)
                while done < self.count and self.patches[done].launch == i:
                    (<int64_t*>(PyByteArray_AS_STRING(block) + self.patches[done].field))[0] = <int64_t>(
                        address[self.patches[done].buffer] + self.patches[done].displacement)
                    done += 1
                kernel(block, double)
        finally:
            PyMem_RawFree(scratch)
        made = []
        for one in self.results:
            if one is None:
                made.append(None)
            else:
                index, view_of = <tuple>one
                made.append(outputs[index] if view_of is None else view_of(outputs[index]))
        return made[0] if self.single else tuple(made)
