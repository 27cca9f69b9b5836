//! How `swarmd` is linked.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // To a fixed address: of a position-independent program each process has a megabyte of pointers of its own, and
    // there is a shim for each container.
    println!("cargo:rustc-link-arg-bin=swarmd=-no-pie");
}
