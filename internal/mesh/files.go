package mesh

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// maxRead is how much of a file is read: one byte more shows that it is too
// large.
const maxRead = max(maxRows, maxEntries)

// A Sum is the SHA-256 of the names and bytes that were read.
type Sum [sha256.Size]byte

// Files are the bytes of a reviewed folder at one time.
type Files struct {
	sum Sum
	// folders lists the folder, ".", and those in it that have a meaning.
	folders map[string][]fs.DirEntry
	bytes   map[string][]byte
	infos   map[string]fs.FileInfo
	// at is when they were read.
	at time.Time
}

// Sum is that of what was read: Files with one Sum have the same bytes.
func (f *Files) Sum() Sum { return f.sum }

// Rewritten reports whether some file has other bytes than before, which may be
// nil, and may still be written: it is the same file, or another one, such as a
// checkout makes, to which somebody wrote lately. What was read of it may be
// half. One that is gone may be on its way back.
func (f *Files) Rewritten(before *Files, lately time.Duration) bool {
	if before != nil {
		for name := range before.infos {
			if f.infos[name] == nil {
				return true
			}
		}
	}
	for name, info := range f.infos {
		if before == nil || before.infos[name] == nil {
			return true // a new file, and nobody knows how it came
		}
		if bytes.Equal(f.bytes[name], before.bytes[name]) {
			continue
		}
		if os.SameFile(info, before.infos[name]) || f.at.Sub(info.ModTime()) < lately {
			return true
		}
	}
	return false
}

// readFiles reads what has a meaning, and the names of all.
func readFiles(fsys fs.FS) (*Files, error) {
	f := &Files{at: time.Now(), folders: map[string][]fs.DirEntry{}, bytes: map[string][]byte{}, infos: map[string]fs.FileInfo{}}
	h := sha256.New()
	err := f.list(fsys, h, ".")
	if err == nil {
		err = f.readAll(fsys, h)
	}
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	f.sum = Sum(h.Sum(nil))
	return f, nil
}

func (f *Files) list(fsys fs.FS, h hash.Hash, folder string) error {
	entries, err := fs.ReadDir(fsys, folder)
	if err != nil {
		return err
	}
	f.folders[folder] = entries
	for _, e := range entries {
		fmt.Fprintf(h, "name %q %t\n", path.Join(folder, e.Name()), e.IsDir())
	}
	return nil
}

func (f *Files) readAll(fsys fs.FS, h hash.Hash) error {
	var errs []error
	for _, name := range []string{accessFile, guardFile, adminFile, servicesFile, entriesFile, egressFile, tokensFile, modesFile} {
		errs = append(errs, f.read(fsys, h, name))
	}
	for _, e := range f.folders["."] {
		folder := e.Name()
		if !e.IsDir() || !slices.Contains(knownFolders, folder) {
			continue
		}
		if err := f.list(fsys, h, folder); err != nil {
			return errors.Join(append(errs, err)...)
		}
		for _, e := range f.folders[folder] {
			name, wanted := e.Name(), path.Ext(e.Name()) == testExtension
			switch folder {
			case candidateFolder:
				wanted = name == accessFile || name == guardFile
			case routesFolder:
				wanted = wanted || path.Ext(name) == descriptorExtension
			}
			if wanted && !e.IsDir() && !aside(name) {
				errs = append(errs, f.read(fsys, h, path.Join(folder, name)))
			}
		}
	}
	return errors.Join(errs...)
}

// read reads a file if it is there.
func (f *Files) read(fsys fs.FS, h hash.Hash, name string) error {
	file, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		fmt.Fprintf(h, "none %q\n", name)
		return nil
	}
	if err != nil {
		return err
	}
	info, err := file.Stat()
	b := []byte{}
	if err == nil {
		b, err = io.ReadAll(io.LimitReader(file, maxRead+1))
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	fmt.Fprintf(h, "file %q %d\n", name, len(b))
	h.Write(b)
	f.bytes[name], f.infos[name] = b, info
	return nil
}

// aside reports whether a file may stand in the folder and says nothing.
func aside(name string) bool {
	return strings.HasPrefix(name, ".") || slices.Contains(Beside, path.Ext(name))
}
