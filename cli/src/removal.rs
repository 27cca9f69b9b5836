//! What `rm` of every noun does: each argument in turn, echoed when it is gone.

use tonic::Status;

use crate::failure::{Failure, Result};
use crate::output;
use crate::output::list;

/// Removes each, and goes on after one that cannot be removed.
pub async fn each(
    references: &[String],
    remove: impl AsyncFn(String) -> std::result::Result<(), Status>,
) -> Result {
    let mut errors = Vec::new();
    for reference in references {
        match remove(reference.clone()).await {
            Ok(()) => output::line(reference)?,
            Err(status) => errors.extend(Failure::from(status).text()),
        }
    }
    list::finish(&errors)
}
