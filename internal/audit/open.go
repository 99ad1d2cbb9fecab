package audit

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Open opens the log at cfg.Path and continues its chain, or starts one. What
// a crash left of a last line is moved to Path.torn-<n>, and a gap record says
// so. A file that does not end like an audit log is refused untouched.
func Open(cfg Config) (*Log, error) { return open(cfg, false) }

func open(cfg Config, copied bool) (*Log, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	f, err := openLocked(cfg.Path)
	if err != nil {
		return nil, fmt.Errorf("open audit log: %w", err)
	}
	l := newLog(cfg)
	l.file, l.copied = f, copied
	if err := l.resume(f); err != nil {
		return nil, errors.Join(fmt.Errorf("open audit log %s: %w", cfg.Path, err), f.Close())
	}
	return l, nil
}

// openLocked opens or makes the file, for its owner only, never through a
// symbolic link, and takes the lock that the process holds until its end.
func openLocked(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o600)
	if errors.Is(err, fs.ErrNotExist) {
		return createLog(path)
	}
	if err != nil {
		return nil, err
	}
	return f, lockLog(f)
}

func createLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	if err := lockLog(f); err != nil {
		return nil, err
	}
	return f, syncDir(filepath.Dir(path))
}

// lockLog closes f when it fails.
func lockLog(f *os.File) error {
	st, err := f.Stat()
	switch {
	case err != nil:
	case !st.Mode().IsRegular():
		err = fmt.Errorf("%s is not a regular file", f.Name())
	case syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil:
		err = ErrLocked
	case st.Mode().Perm() != 0o600:
		err = f.Chmod(0o600)
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lookBack is how much of the end of a file is searched for its last record.
const lookBack = 2 * maxLine

// resume finds the newest record, moves away what follows it, and writes the
// gap record if there was anything.
func (l *Log) resume(f *os.File) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	last, err := lastRecord(f, size)
	if err != nil {
		return err
	}
	if last.end == 0 {
		if err := l.resumeAside(); err != nil {
			return err
		}
	} else {
		l.seq, l.prev = last.seq, last.sum
		if l.first, err = firstSeq(f); err != nil {
			return err
		}
		if err := dropHalfAside(l.cfg.Path, segmentName(l.cfg.Path, l.first)); err != nil {
			return err
		}
	}
	l.synced, l.size = l.seq, last.end
	if last.end == size {
		return nil
	}
	return l.moveTorn(f, last.end, size-last.end)
}

// dropHalfAside undoes what a crash left of putting a file aside: two names of
// one file.
func dropHalfAside(path, aside string) error {
	if !sameFile(path, aside) {
		return nil
	}
	return os.Remove(aside)
}

func sameFile(a, b string) bool {
	sa, err1 := os.Lstat(a)
	sb, err2 := os.Lstat(b)
	return err1 == nil && err2 == nil && os.SameFile(sa, sb)
}

// resumeAside continues after the newest file that was put aside, when a crash
// came between putting it aside and the first record of the new one.
func (l *Log) resumeAside() error {
	aside, err := asideFiles(l.cfg.Path)
	if err != nil {
		return err
	}
	gone, err := kept(l.cfg.Path)
	if err != nil {
		return err
	}
	aside = slices.DeleteFunc(aside, func(name string) bool { return gone.covers(l.cfg.Path, name) })
	if len(aside) == 0 {
		l.seq, l.prev = gone.last(), gone.prev()
		return nil
	}
	f, err := os.Open(aside[len(aside)-1])
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	last, err := lastRecord(f, size)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if last.end != size || size == 0 {
		return fmt.Errorf("%s does not end in a whole record; it was changed after it was put aside", f.Name())
	}
	l.seq, l.prev = last.seq, last.sum
	return nil
}

// lineEnd is where a record ends in its file, with its number and hash.
type lineEnd struct {
	end int64
	seq uint64
	sum hash
	at  time.Time
}

// lastRecord finds the last whole record. The zero lineEnd means that there is
// none and that the file holds at most the beginning of one.
func lastRecord(f io.ReaderAt, size int64) (lineEnd, error) {
	from := max(0, size-lookBack)
	buf := make([]byte, size-from)
	if _, err := f.ReadAt(buf, from); err != nil && !errors.Is(err, io.EOF) {
		return lineEnd{}, err
	}
	for end := len(buf); ; {
		nl := bytes.LastIndexByte(buf[:end], '\n')
		if nl < 0 {
			break
		}
		start := bytes.LastIndexByte(buf[:nl], '\n') + 1
		line := buf[start : nl+1]
		if r, _, err := ParseLine(line); err == nil {
			return lineEnd{from + int64(nl) + 1, r.Seq, sha256.Sum256(line), r.Time}, nil
		}
		end = nl
	}
	// A line feed without a record, or a start that is no record's, means that
	// this is somebody else's file.
	if from > 0 || bytes.IndexByte(buf, '\n') >= 0 || size > 0 && buf[0] != '{' && buf[0] != 0 {
		return lineEnd{}, errors.New("the file does not end in an audit record; move it away to start a new log")
	}
	return lineEnd{}, nil
}

func firstSeq(f io.ReaderAt) (uint64, error) {
	buf := make([]byte, maxLine)
	n, err := f.ReadAt(buf, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	line, _, _ := bytes.Cut(buf[:n], []byte("\n"))
	seq, ok := lineSeq(line)
	if !ok {
		return 0, errors.New("the first line is not an audit record; move the file away to start a new log")
	}
	return seq, nil
}

// lineSeq reads the number of a line without parsing the rest.
func lineSeq(line []byte) (uint64, bool) {
	rest, ok := bytes.CutPrefix(line, []byte(`{"v":1,"seq":`))
	if !ok {
		return 0, false
	}
	i := bytes.IndexByte(rest, ',')
	if i < 0 {
		return 0, false
	}
	n, err := strconv.ParseUint(string(rest[:i]), 10, 64)
	return n, err == nil && n > 0
}

// moveTorn moves the bytes after the last record to their own file, cuts them
// off, and records the gap.
func (l *Log) moveTorn(f *os.File, at, n int64) error {
	name, err := keepTorn(l.cfg.Path, io.NewSectionReader(f, at, n))
	if err != nil {
		return fmt.Errorf("move torn end away: %w", err)
	}
	if err := f.Truncate(at); err != nil {
		return fmt.Errorf("cut torn end: %w", err)
	}
	l.cfg.Log.Warn("audit log ended in a part of a record; moved away", "path", l.cfg.Path, "to", name, "bytes", n)
	if l.copied {
		return nil // who sends the records will send that one again
	}
	return l.Append(&Record{Kind: KindGap, Detail: fmt.Sprintf(
		"%d bytes after record %d were no whole record; moved to %s", n, l.seq, filepath.Base(name))})
}

func keepTorn(path string, torn io.Reader) (string, error) {
	for n := 1; ; n++ {
		name := path + ".torn-" + strconv.Itoa(n)
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		_, err = io.Copy(f, torn)
		return name, errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(name)))
	}
}

// segmentName is where the file that starts with record first is put aside.
// Twenty digits keep names in order for every possible number.
func segmentName(path string, first uint64) string {
	return fmt.Sprintf("%s.%020d", path, first)
}

// asideFiles lists the files put aside, oldest first.
func asideFiles(path string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		if !ok || len(digits) != 20 {
			continue
		}
		if _, err := strconv.ParseUint(digits, 10, 64); err == nil {
			out = append(out, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	slices.Sort(out)
	return out, nil
}

// Segments lists the files of the log at path, oldest first, the one being
// written last.
func Segments(path string) ([]string, error) {
	out, err := asideFiles(path)
	if err != nil {
		return nil, fmt.Errorf("list audit log: %w", err)
	}
	if _, err := os.Stat(path); err == nil {
		if n := len(out); n > 0 && sameFile(out[n-1], path) {
			out = out[:n-1] // being put aside at this moment
		}
		out = append(out, path)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("list audit log: %s: %w", path, fs.ErrNotExist)
	}
	return out, nil
}
