package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"sallyport/internal/daemon"
)

// A making puts files and directories where another user may have a hand.
//
// The superuser works in directories that belong to whom a program runs as, or
// will: a name in them can become a link at any moment. So everything goes
// through an open directory that no link leads out of, a file has its owner
// before it has its name, and directories are given away when nothing is left
// to do in them.
type making struct {
	uid, gid int // of whom it is for; -1: of who makes it
	roots    []*os.Root
	made     []madeName // in the order of their making
}

type madeName struct {
	in   *os.Root
	name string
	dir  bool
}

// open makes a directory, and those above it open to be read.
func (m *making) open(dir string, mode fs.FileMode) (*os.Root, error) {
	above := dir // what there is of it
	for above != filepath.Dir(above) {
		st, err := os.Stat(above)
		if err == nil && !st.IsDir() {
			return nil, daemon.Exit(daemon.Failed, fmt.Errorf("%s is no directory", above))
		}
		if err == nil {
			break
		}
		above = filepath.Dir(above)
	}
	failed := func(err error) error {
		return daemon.Hint(daemon.Exit(daemon.Failed, fmt.Errorf("make %s: %w", dir, err)), "run it as a user who may write there, or name other directories with --dir and --data")
	}
	name, err := filepath.Rel(above, dir)
	if err != nil {
		return nil, failed(err)
	}
	in, err := os.OpenRoot(above)
	if err != nil {
		return nil, failed(err)
	}
	m.roots = append(m.roots, in)
	if err := m.mkdir(in, name, mode); err != nil {
		return nil, failed(err)
	}
	r, err := in.OpenRoot(name)
	if err != nil {
		return nil, failed(err)
	}
	m.roots = append(m.roots, r)
	return r, nil
}

// mkdir makes what is not there of a path, the last of it with a mode.
func (m *making) mkdir(in *os.Root, name string, mode fs.FileMode) error {
	if name == "." {
		return nil
	}
	if err := m.mkdir(in, filepath.Dir(name), 0o755); err != nil {
		return err
	}
	if err := in.Mkdir(name, mode); errors.Is(err, fs.ErrExist) {
		return nil
	} else if err != nil {
		return err
	}
	m.made = append(m.made, madeName{in, name, true})
	return onDirectory(in, name, func(d *os.File) error { return d.Chmod(mode) }) // whatever the umask
}

// onDirectory does something to a directory itself: what its name became
// meanwhile may be a file that has another name, too.
func onDirectory(in *os.Root, name string, do func(*os.File) error) error {
	d, err := in.OpenFile(name, os.O_RDONLY|syscall.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	return errors.Join(do(d), d.Close())
}

// write makes a file, whole or not at all.
func (m *making) write(in *os.Root, name string, data []byte, mode fs.FileMode) error {
	dir, base := filepath.Split(name)
	tmp := dir + "." + base + "." + strings.ToLower(rand.Text())
	f, err := in.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Chmod(mode)); err == nil && m.uid >= 0 {
		err = f.Chown(m.uid, m.gid)
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = in.Rename(tmp, name)
	}
	if err != nil {
		_ = in.Remove(tmp)
		return err
	}
	m.made = append(m.made, madeName{in, name, false})
	return onDirectory(in, filepath.Dir(name), (*os.File).Sync)
}

// give gives the directories away, those within others first.
func (m *making) give() error {
	for _, d := range slices.Backward(m.made) {
		if !d.dir || m.uid < 0 {
			continue
		}
		if err := onDirectory(d.in, d.name, func(f *os.File) error { return f.Chown(m.uid, m.gid) }); err != nil {
			return err
		}
	}
	return nil
}

// end takes back what was made if it is not to stay.
func (m *making) end(failed bool) {
	if failed {
		for _, d := range slices.Backward(m.made) {
			_ = d.in.Remove(d.name) // a directory that another has put something into stays
		}
	}
	for _, r := range m.roots {
		_ = r.Close()
	}
}
