//! Where a function is in a shared library: the version of it that programs are
//! linked with today.
//!
//! A library may have a function several times, one version each
//! (`ibv_reg_mr@IBVERBS_1.0` beside `ibv_reg_mr@@IBVERBS_1.1`). Those that
//! are kept for old programs are marked hidden; a look-up by name alone may find
//! one of them, which nobody calls.

use object::Endianness;
use object::elf::{FileHeader64, PF_X, PT_LOAD, SHN_UNDEF, SHT_DYNSYM, STT_FUNC};
use object::read::SymbolIndex;
use object::read::elf::{FileHeader as _, ProgramHeader as _, Sym as _};
use thiserror::Error;

/// Why a library cannot be understood.
#[derive(Debug, Error)]
pub(crate) enum SymbolError {
    /// It is no shared library, or a damaged one.
    #[error(transparent)]
    Elf(#[from] object::read::Error),
    /// A function is where there is no code.
    #[error("the address of {function} is in no segment of code")]
    NoCode {
        /// Which.
        function: String,
    },
}

/// The functions of a library, to be asked one by one.
pub(crate) struct Library<'data> {
    data: &'data [u8],
    header: &'data FileHeader64<Endianness>,
    endian: Endianness,
}

impl<'data> Library<'data> {
    /// Reads the beginning of a library.
    pub(crate) fn parse(data: &'data [u8]) -> Result<Self, SymbolError> {
        let header = FileHeader64::<Endianness>::parse(data)?;
        Ok(Self { data, header, endian: header.endian()? })
    }

    /// Where in the file the default version of `function` begins; none where it has no such function.
    pub(crate) fn offset_of(&self, function: &str) -> Result<Option<u64>, SymbolError> {
        let (data, endian) = (self.data, self.endian);
        let sections = self.header.sections(endian, data)?;
        let symbols = sections.symbols(endian, data, SHT_DYNSYM)?;
        let versions = sections.versions(endian, data)?;
        for (index, symbol) in symbols.iter().enumerate() {
            if symbol.st_type() != STT_FUNC || symbol.st_shndx(endian) == SHN_UNDEF {
                continue;
            }
            if symbol.name(endian, symbols.strings())? != function.as_bytes() {
                continue;
            }
            let is_hidden = versions
                .as_ref()
                .is_some_and(|all| all.version_index(endian, SymbolIndex(index)).is_hidden());
            if !is_hidden {
                let offset = self.offset_in_file(symbol.st_value(endian))?;
                let no_code = || SymbolError::NoCode { function: function.to_owned() };
                return offset.ok_or_else(no_code).map(Some);
            }
        }
        Ok(None)
    }

    fn offset_in_file(&self, address: u64) -> Result<Option<u64>, SymbolError> {
        for segment in self.header.program_headers(self.endian, self.data)? {
            let is_code =
                segment.p_type(self.endian) == PT_LOAD && segment.p_flags(self.endian) & PF_X == PF_X;
            let into = address.checked_sub(segment.p_vaddr(self.endian));
            if let Some(into) = into.filter(|&into| is_code && into < segment.p_filesz(self.endian)) {
                return Ok(segment.p_offset(self.endian).checked_add(into));
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_library_is_an_error() {
        assert!(Library::parse(b"").is_err());
        assert!(
            Library::parse(b"#!/bin/sh\nthis is no ELF file, and long enough to be read as one's header\n")
                .is_err()
        );
    }

    #[test]
    fn damaged_library_is_an_error_or_has_no_such_function() {
        let own = std::fs::read("/proc/self/exe").expect("this test");
        // Each piece of the tables in its turn.
        for damaged in (0..own.len().min(4096)).step_by(7) {
            let mut bytes = own.clone();
            bytes[damaged] ^= 0xff;
            let found = Library::parse(&bytes).and_then(|library| library.offset_of("ibv_reg_mr"));
            assert!(!matches!(found, Ok(Some(_))), "byte {damaged}");
        }
    }
}
