/* module.c: the module's init function: cffi's own, then our types. */
#include "py_copy.h"

/* PyInit__core of the generated file, renamed by CMakeLists.txt. */
PyMODINIT_FUNC kvmmm_cffi_init(void);

int py_add_type(PyObject *module, PyType_Spec *spec, PyTypeObject **slot)
{
    PyObject *type = PyType_FromSpec(spec);
    if (!type)
        return -1;
    *slot = (PyTypeObject *)type;
    const char *dot = strrchr(spec->name, '.');
    return PyModule_AddObjectRef(module, dot ? dot + 1 : spec->name, type);
}

__attribute__((visibility("default"))) PyMODINIT_FUNC PyInit__core(void)
{
    PyObject *module = kvmmm_cffi_init();
    if (!module)
        return NULL;
    if (py_mapping_register(module) || py_registers_register(module) || py_exit_register(module) ||
        py_vcpu_register(module) || py_gate_register(module) || py_segment_register(module) ||
        py_mapper_register(module) || py_safecopy_register(module) || py_copy_register(module) ||
        py_options_register(module) || py_lock_register(module) || py_token_register(module) || py_walk_register(module) ||
        py_mirror_register(module) || py_pinned_register(module)) {
        Py_DECREF(module);
        return NULL;
    }
    return module;
}
