//! Random numbers of the simulation's own: one stream per purpose, all from the seed.

use crate::libc_seam::next_random;

/// A stream of numbers.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// The stream for one purpose of one seed.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let mut state = seed ^ 0x5177_a21d_7d15_aa01;
        for byte in purpose.bytes() {
            state = state.rotate_left(7) ^ u64::from(byte);
            next_random(&mut state);
        }
        Self(state)
    }

    /// Any number.
    pub fn word(&mut self) -> u64 {
        next_random(&mut self.0)
    }

    /// Below `bound`; 0 if that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.word()) * u128::from(bound)) >> 64) as u64
    }

    /// From `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True once in so many times; never for 0.
    pub fn once_in(&mut self, times: u64) -> bool {
        times > 0 && self.below(times) == 0
    }

    /// True with this probability in a million.
    pub fn ppm(&mut self, probability: u64) -> bool {
        self.below(1_000_000) < probability
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, among: &'a [T]) -> Option<&'a T> {
        let at = self.below(among.len() as u64) as usize;
        among.get(at)
    }

    /// One of them, as often as their weights say.
    pub fn weighted<T: Copy>(&mut self, among: &[(T, u64)]) -> T {
        let mut at = self.below(among.iter().map(|(_, weight)| weight).sum());
        let chosen = among
            .iter()
            .find(|(_, weight)| match at.checked_sub(*weight) {
                Some(rest) => {
                    at = rest;
                    false
                }
                None => true,
            });
        chosen.or(among.first()).expect("there is something").0
    }

    /// The same with other weights: a quarter is left out, a quarter comes four times as often.
    /// Seeds that do a few things often find what those that do a little of all do not.
    pub fn stress<T: Copy>(&mut self, among: &[(T, u64)]) -> Vec<(T, u64)> {
        let mut stressed: Vec<(T, u64)> = among
            .iter()
            .map(|(what, weight)| (*what, weight * [0, 1, 1, 4][self.below(4) as usize]))
            .collect();
        if stressed.iter().all(|(_, weight)| *weight == 0) {
            stressed = among.to_vec();
        }
        stressed
    }

    /// Around `mean`, most often less, now and then several times as much.
    pub fn around(&mut self, mean: u64) -> u64 {
        // The product of two even dice has a long tail; its mean is a quarter.
        let (a, b) = (self.below(1 << 16), self.below(1 << 16));
        ((u128::from(mean) * 4 * u128::from(a) * u128::from(b)) >> 32) as u64
    }
}
