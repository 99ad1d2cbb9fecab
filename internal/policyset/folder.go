package policyset

import (
	"bytes"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
)

// A folder shows files as a file system that cannot be written.
type folder []File

// Open implements fs.FS.
func (f folder) Open(name string) (fs.File, error) {
	if !fs.ValidPath(name) {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrInvalid}
	}
	for i := range f {
		if f[i].Name == name {
			return &openFile{bytes.NewReader(f[i].Data), infoOf(f[i])}, nil
		}
	}
	in := f.list(name)
	if len(in) == 0 && name != "." {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	return &openFolder{info{name: path.Base(name), mode: fs.ModeDir | 0o555}, in}, nil
}

// list is what stands directly in a folder, sorted by name.
func (f folder) list(name string) (in []fs.DirEntry) {
	prefix := name + "/"
	if name == "." {
		prefix = ""
	}
	for _, file := range f {
		rest, ok := strings.CutPrefix(file.Name, prefix)
		if !ok {
			continue
		}
		i := infoOf(file)
		if first, _, deeper := strings.Cut(rest, "/"); deeper {
			i = info{name: first, mode: fs.ModeDir | 0o555}
		}
		in = append(in, fs.FileInfoToDirEntry(i))
	}
	slices.SortFunc(in, func(a, b fs.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	return slices.CompactFunc(in, func(a, b fs.DirEntry) bool { return a.Name() == b.Name() })
}

type openFile struct {
	*bytes.Reader
	info info
}

func (f *openFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *openFile) Close() error               { return nil }

type openFolder struct {
	info info
	left []fs.DirEntry
}

func (f *openFolder) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *openFolder) Close() error               { return nil }

func (f *openFolder) Read([]byte) (int, error) {
	return 0, &fs.PathError{Op: "read", Path: f.info.name, Err: fs.ErrInvalid}
}

// ReadDir implements fs.ReadDirFile.
func (f *openFolder) ReadDir(n int) ([]fs.DirEntry, error) {
	if n > 0 && len(f.left) == 0 {
		return nil, io.EOF
	}
	if n <= 0 {
		n = len(f.left)
	}
	n = min(n, len(f.left))
	out := f.left[:n:n]
	f.left = f.left[n:]
	return out, nil
}

type info struct {
	name string
	size int64
	mode fs.FileMode
}

func infoOf(f File) info {
	return info{name: path.Base(f.Name), size: int64(len(f.Data)), mode: 0o444}
}

func (i info) Name() string       { return i.name }
func (i info) Size() int64        { return i.size }
func (i info) Mode() fs.FileMode  { return i.mode }
func (i info) ModTime() time.Time { return time.Time{} }
func (i info) IsDir() bool        { return i.mode.IsDir() }
func (i info) Sys() any           { return nil }
