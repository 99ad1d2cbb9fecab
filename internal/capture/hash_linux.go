package capture

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxHashes bounds the memory of hashes; a host runs few distinct programs
// that ask for an identity.
const maxHashes = 256

// restTime is longer than the coarsest time stamp of a file system in use.
const restTime = 3 * time.Second

// A fileState changes whenever the file's content may have: the change time
// cannot be set by a program.
type fileState struct {
	dev, ino uint64
	size     int64
	mtime    unix.Timespec
	ctime    unix.Timespec
}

var hashes = struct {
	mu    sync.Mutex // guards known
	known map[fileState][32]byte
}{known: map[fileState][32]byte{}}

// HashExe gives the SHA-256 of the executable that pid runs. It reads the file
// that is mapped, not what now stands at its path. A file that did not change
// since is not read again.
func HashExe(pid int) ([32]byte, error) {
	h, err := HashFile("/proc/" + strconv.Itoa(pid) + "/exe")
	if err != nil {
		return h, fmt.Errorf("hash executable of pid %d: %w", pid, procErr(err))
	}
	return h, nil
}

// HashFile gives the SHA-256 of the file at path, which must not change while
// it is read.
func HashFile(path string) ([32]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return [32]byte{}, err
	}
	defer f.Close()
	before, err := stateOf(f)
	if err != nil {
		return [32]byte{}, err
	}
	hashes.mu.Lock()
	sum, ok := hashes.known[before]
	hashes.mu.Unlock()
	if ok {
		return sum, nil
	}
	// A clock tick may hide a second write: only a file at rest is remembered.
	rested := time.Since(time.Unix(before.ctime.Unix())) > restTime
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return [32]byte{}, err
	}
	after, err := stateOf(f)
	if err != nil {
		return [32]byte{}, err
	}
	if after != before {
		return [32]byte{}, errors.New("file changed while it was read")
	}
	sum = [32]byte(h.Sum(nil))
	if !rested {
		return sum, nil
	}
	hashes.mu.Lock()
	defer hashes.mu.Unlock()
	if len(hashes.known) >= maxHashes {
		clear(hashes.known)
	}
	hashes.known[before] = sum
	return sum, nil
}

func stateOf(f *os.File) (fileState, error) {
	var st unix.Stat_t
	rc, err := f.SyscallConn()
	if err != nil {
		return fileState{}, err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.Fstat(int(fd), &st) }); err != nil || serr != nil {
		return fileState{}, errors.Join(err, serr)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fileState{}, errors.New("not a regular file")
	}
	return fileState{uint64(st.Dev), st.Ino, st.Size, st.Mtim, st.Ctim}, nil
}
