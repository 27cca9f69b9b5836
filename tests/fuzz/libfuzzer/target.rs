// One target as a libFuzzer program. `SWARM_FUZZ_SEEDS=DIR` makes it write its seeds there and end.
macro_rules! target {
    ($name:ident) => {
        libfuzzer_sys::fuzz_target!(
            init: {
                if let Some(dir) = std::env::var_os("SWARM_FUZZ_SEEDS") {
                    for (number, seed) in (swarm_fuzz::seeds::$name)().iter().enumerate() {
                        let path = std::path::Path::new(&dir).join(format!("seed-{number}"));
                        std::fs::write(path, seed).expect("write a seed");
                    }
                    std::process::exit(0);
                }
            },
            |data: &[u8]| swarm_fuzz::run::$name(data)
        );
    };
}
