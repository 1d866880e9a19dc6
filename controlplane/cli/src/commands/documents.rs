//! What is made from the command line's own description: `ramferry completions`
//! and `ramferry man`.

use clap::CommandFactory as _;
use clap_complete::Shell;

use crate::args::{Cli, ManArgs};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::print;

pub(super) fn completions(shell: Shell) -> Result<Exit, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ramferry", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(Exit::Done)
}

pub(super) fn man(args: &ManArgs) -> Result<Exit, Failure> {
    if let Some(directory) = &args.out_dir {
        clap_mangen::generate_to(Cli::command(), directory).map_err(|source| Failure::File {
            option: "--out-dir",
            path: directory.clone(),
            source,
        })?;
        return Ok(Exit::Done);
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(Cli::command())
        .render(&mut page)
        .map_err(|source| Failure::System { what: "cannot render the manual page", source })?;
    print(&String::from_utf8_lossy(&page))?;
    Ok(Exit::Done)
}
