package sink

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// FileConfig is a file of this machine, for an agent that reads files.
type FileConfig struct {
	// Path of the file, made with mode 0600. Its directory must be there.
	// Required.
	Path string `yaml:"path"`
	// MaxBytes is the size at which the file is put aside as
	// <path>.<time in UTC>. Default 64 MiB.
	MaxBytes int64 `yaml:"max_bytes"`
	// MaxAge is the age at which it is put aside, by its first record here.
	// Default 24 h.
	MaxAge time.Duration `yaml:"max_age"`
	// Keep is how many files put aside are kept. Default 0: all.
	Keep int `yaml:"keep"`
}

func (c *FileConfig) validate() error {
	var errs []error
	if !filepath.IsAbs(c.Path) {
		errs = append(errs, fmt.Errorf("path: %.80q is not absolute; write a path such as /var/log/sallyport/audit.jsonl", c.Path))
	}
	if c.MaxBytes < 0 || c.MaxBytes > 0 && c.MaxBytes < 4096 {
		errs = append(errs, fmt.Errorf("max_bytes: %d is less than 4096", c.MaxBytes))
	}
	if c.MaxAge < 0 || c.MaxAge > 0 && c.MaxAge < time.Second {
		errs = append(errs, fmt.Errorf("max_age: %s is less than 1s", c.MaxAge))
	}
	if c.Keep < 0 {
		errs = append(errs, fmt.Errorf("keep: %d is negative", c.Keep))
	}
	return errors.Join(errs...)
}

func (c *FileConfig) open(env Env, _ string) (peer, error) {
	if c.Path == env.Path {
		return nil, errors.New("path: is the audit log itself; choose another")
	}
	return &file{cfg: *c, max: cmp.Or(c.MaxBytes, 64<<20), age: cmp.Or(c.MaxAge, 24*time.Hour)}, nil
}

// file is the peer of kind file. A batch is taken when it is on the disk.
type file struct {
	cfg  FileConfig
	max  int64
	age  time.Duration
	f    *os.File
	size int64
	born time.Time
}

func (p *file) deliver(_ context.Context, b *batch) error {
	if err := p.ready(); err != nil {
		return err
	}
	body := b.lines()
	if p.size > 0 && (p.size+int64(len(body)) > p.max || time.Since(p.born) > p.age) {
		if err := p.rotate(); err != nil {
			return err
		}
	}
	if p.size == 0 {
		p.born = time.Now()
	}
	n, err := p.f.Write(body)
	if err == nil {
		err = p.f.Sync()
	}
	if err != nil {
		// What was written of it comes again.
		return errors.Join(err, p.f.Truncate(p.size))
	}
	p.size += int64(n)
	return nil
}

// ready opens the file, unless it is open and still the one at its path: what
// was moved away by somebody else is not written to any more.
func (p *file) ready() error {
	if p.f != nil {
		mine, err := p.f.Stat()
		now, gone := os.Lstat(p.cfg.Path)
		if err == nil && gone == nil && os.SameFile(mine, now) {
			return nil
		}
		p.close()
	}
	f, err := os.OpenFile(p.cfg.Path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(p.adopt(f), syncDir(filepath.Dir(p.cfg.Path))); err != nil {
		return errors.Join(err, f.Close())
	}
	p.f = f
	return nil
}

// syncDir brings a new name to the disk: without it a crash of the machine
// could take the file away with what was sent.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// adopt makes f ours: only we write it, others do not read it, and a line that
// a crash has cut off is removed, since its batch comes again.
func (p *file) adopt(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", p.cfg.Path)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%s: another process or sink writes it: %w", p.cfg.Path, err)
	}
	if err := f.Chmod(0o600); err != nil {
		return err
	}
	p.size, p.born = st.Size(), st.ModTime()
	end := make([]byte, min(p.size, 1<<20))
	if _, err := f.ReadAt(end, p.size-int64(len(end))); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if cut := int64(len(end) - 1 - bytes.LastIndexByte(end, '\n')); cut > 0 {
		p.size -= cut
		return f.Truncate(p.size)
	}
	return nil
}

// asideLayout is the time in the name of a file put aside; names sort by it.
const asideLayout = "20060102T150405.000000000Z"

// rotate puts the file aside and begins another.
func (p *file) rotate() error {
	aside := p.cfg.Path + "." + time.Now().UTC().Format(asideLayout)
	if err := os.Rename(p.cfg.Path, aside); err != nil {
		return err
	}
	p.close()
	if err := p.ready(); err != nil {
		return err
	}
	return p.prune()
}

// prune removes the oldest files put aside beyond Keep.
func (p *file) prune() error {
	if p.cfg.Keep == 0 {
		return nil
	}
	entries, err := os.ReadDir(filepath.Dir(p.cfg.Path))
	if err != nil {
		return err
	}
	var names []string
	for _, e := range entries {
		at, ok := strings.CutPrefix(e.Name(), filepath.Base(p.cfg.Path)+".")
		if _, err := time.Parse(asideLayout, at); ok && err == nil {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	for _, n := range names[:max(0, len(names)-p.cfg.Keep)] {
		if err := os.Remove(filepath.Join(filepath.Dir(p.cfg.Path), n)); err != nil {
			return err
		}
	}
	return nil
}

func (p *file) close() {
	if p.f != nil {
		p.f.Close() // each batch was synced
		p.f = nil
	}
}
