package audit

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// mendEvery is the least time between two attempts to make the file anew.
const mendEvery = time.Second

// mend makes the file anew after a failed fsync, with the right to call fsync.
//
// The kernel tells a failure once, and may then take for clean, or drop, what did
// not reach the disk: to sync again would succeed and prove nothing. So all of the
// file is written into another, which is synced and takes its place. What is read
// for that may come from the kernel's memory or from the disk; that it is what was
// appended is shown by the chain, whose newest hash is known here. If it is not,
// the log stays as it is, and takes nothing. Meanwhile records are refused at
// once, and counted.
func (l *Log) mend() error {
	l.mu.Lock()
	dead, due := l.dead, time.Since(l.mended) >= mendEvery
	if l.closed {
		dead, due = ErrClosed, false
	}
	if due {
		l.mended = time.Now()
	}
	l.mu.Unlock()
	if dead == nil || !due || l.mem != nil {
		return dead
	}
	if err := l.replace(); err != nil {
		l.cfg.Log.Warn("audit log cannot be written anew; trying again", "path", l.cfg.Path, "err", err)
		return dead
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead, l.synced = nil, l.seq
	l.cfg.Log.Info("audit log was written anew after a failed sync", "path", l.cfg.Path, "bytes", l.size)
	if l.lost() == 0 || l.tellRefused() == nil {
		l.writable()
	}
	return nil
}

// replace puts a new file with all lines in the place of the one that is written.
// Nobody else writes while dead is set.
func (l *Log) replace() error {
	name := l.cfg.Path + ".new"
	next, err := l.copyTo(name)
	if err != nil {
		return err
	}
	if err := os.Rename(name, l.cfg.Path); err != nil {
		return errors.Join(err, next.Close(), os.Remove(name))
	}
	l.mu.Lock()
	old := l.file
	l.file, l.torn = next, false
	l.mu.Unlock()
	_ = old.Close() // it has failed already
	return syncDir(filepath.Dir(l.cfg.Path))
}

// copyTo writes the whole lines of the file into a new one, onto the disk.
func (l *Log) copyTo(name string) (next *os.File, err error) {
	path := l.cfg.Path
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if next, err = createLog(name); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, next.Close(), os.Remove(name))
		}
	}()
	old, err := os.Open(path)
	if err != nil {
		return next, err
	}
	defer old.Close()
	w := walk{seq: max(l.first, 1) - 1, prev: l.prev}
	if l.size > 0 {
		line, err := firstLine(path)
		if err != nil {
			return next, err
		}
		if _, w.prev, err = ParseLine(line); err != nil {
			return next, err
		}
		err = w.lines(io.TeeReader(io.LimitReader(old, l.size), next), false)
		if err == nil && (w.seq != l.seq || w.prev != l.prev) {
			err = fmt.Errorf("the last record read is %d, and not %d as it was appended", w.seq, l.seq)
		}
		if err != nil {
			return next, err
		}
	}
	return next, next.Sync()
}
