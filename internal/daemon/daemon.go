// Package daemon holds what every process of the house has: strict loading of
// its configuration, logs, exit codes, readiness, the admin socket, the watch
// on files, signals and the word to systemd.
//
// It knows nothing of identity, policy or traffic. Run, Watch and Signals own
// the goroutines they start and end them before they return or are cancelled.
package daemon

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// The exit codes of every program.
const (
	OK          = 0 // done, or the check passed
	Failed      = 1 // it failed, or a check did not pass
	Usage       = 2 // the command line or the configuration is wrong
	Unreachable = 3 // the process to talk to does not answer
)

// An ExitError is an error that decides the exit code of the process.
type ExitError struct {
	Code int
	Err  error
}

func (e *ExitError) Error() string { return e.Err.Error() }

// Unwrap returns the cause.
func (e *ExitError) Unwrap() error { return e.Err }

// Exit gives err an exit code. A nil err stays nil.
func Exit(code int, err error) error {
	if err == nil {
		return nil
	}
	return &ExitError{Code: code, Err: err}
}

// Code returns the exit code that err asks for: OK for nil, Failed when the
// error does not say.
func Code(err error) int {
	if err == nil {
		return OK
	}
	var e *ExitError
	if errors.As(err, &e) {
		return e.Code
	}
	return Failed
}

type hinted struct {
	err  error
	next string
}

func (h *hinted) Error() string { return h.err.Error() + "; next: " + h.next }
func (h *hinted) Unwrap() error { return h.err }

// Hint ends err with the next step for the person who reads it. An error that
// already names a next step keeps its own: the cause knows best.
func Hint(err error, next string) error {
	var h *hinted
	if err == nil || errors.As(err, &h) || strings.Contains(err.Error(), "; next: ") {
		return err
	}
	return &hinted{err: err, next: next}
}

// OwnDir makes the directory that the setting called field names, mode 0700,
// unless it is there, and sees that this process may write in it.
func OwnDir(field, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Hint(fmt.Errorf("make %s %s: %w", field, dir, cause(err)), "choose a "+field+" that this user may write")
	}
	// What lies in it is believed at the next start: nobody else may put it there.
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at %s %s: %w", field, dir, cause(err))
	}
	if info.Mode().Perm()&0o022 != 0 {
		return Hint(fmt.Errorf("%s %s may be written by others (mode %04o)", field, dir, info.Mode().Perm()), "chmod go-w "+dir)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return Hint(fmt.Errorf("%s %s belongs to uid %d, this is uid %d", field, dir, st.Uid, os.Geteuid()), fmt.Sprintf("chown %d %s, or choose another %s", os.Geteuid(), dir, field))
	}
	f, err := os.CreateTemp(dir, ".writable-*")
	if err != nil {
		return Hint(fmt.Errorf("write in %s %s: %w", field, dir, cause(err)), fmt.Sprintf("let uid %d own it, or choose another %s", os.Geteuid(), field))
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// WriteFile replaces path with data so that a crash at any moment leaves
// either the old content or the new, never a part: it writes a temporary file
// beside it, syncs it, renames it and syncs the directory. The file gets
// exactly perm, whatever the umask.
func WriteFile(path string, data []byte, perm fs.FileMode) error {
	dir := filepath.Dir(path)
	var nonce [8]byte
	rand.Read(nonce[:])
	tmp := filepath.Join(dir, "."+filepath.Base(path)+"."+hex.EncodeToString(nonce[:]))
	if err := writeSynced(tmp, data, perm); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("write %s: %w", path, cause(err))
	}
	if err := os.Rename(tmp, path); err != nil {
		os.Remove(tmp)
		return fmt.Errorf("write %s: %w", path, cause(err))
	}
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory of %s: %w", path, cause(err))
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory of %s: %w", path, cause(err))
	}
	return nil
}

func writeSynced(path string, data []byte, perm fs.FileMode) (err error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	if err := f.Chmod(perm); err != nil {
		return err
	}
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

// cause strips the operation and the path that os puts around an error: the
// caller names them already.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	var l *os.LinkError
	if errors.As(err, &l) {
		return l.Err
	}
	return err
}
