package archive

import (
	"bufio"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"filippo.io/age"
)

// A Report is what Verify has found.
type Report struct {
	Segments []Link `json:"segments"`
	Removed  int    `json:"removed"`
	Records  int    `json:"records"`
	Bytes    int64  `json:"bytes"`
	// Problems are what is wrong; without any the archive is whole.
	Problems []string `json:"problems,omitempty"`
	// Own says that the key which signed the head came with the archive, so that
	// whoever could write the archive could have made it.
	Own bool `json:"own_key"`
}

// Verify checks an archive without being able to read it: each segment has the
// bytes that the chain says, the chain is whole, and open, given the signed head
// and the key, says what was signed. key may be empty for the one beside it.
func Verify(dir, key string, open func(signed []byte, key string) (Head, error)) (rep Report, err error) {
	say := func(format string, args ...any) { rep.Problems = append(rep.Problems, fmt.Sprintf(format, args...)) }
	c, err := loadChain(dir)
	if err != nil {
		if errors.Is(err, os.ErrPermission) {
			return rep, err
		}
		say("%v", err)
	}
	signed, err := os.ReadFile(filepath.Join(dir, headFile))
	if err != nil {
		return rep, fmt.Errorf("%s is no archive: %w", dir, err)
	}
	if key == "" {
		rep.Own = true
		b, err := os.ReadFile(filepath.Join(dir, keyFile))
		if err != nil {
			return rep, err
		}
		key = strings.TrimSpace(string(b))
	}
	switch h, err := open(signed, key); {
	case err != nil:
		say("head: %v", err)
	case h != c.head(h.Origin):
		say("the signed head is of %d lines, which end otherwise than the %d that can be read", h.Size, len(c.links))
	}
	rep.Segments = c.live()
	known := map[string]bool{}
	for _, l := range c.links {
		rep.Removed += len(l.Removed)
	}
	for _, l := range rep.Segments {
		known[l.File] = true
		sum, size, err := hashFile(filepath.Join(dir, l.File))
		switch {
		case err != nil:
			say("%s: %v", l.File, err)
		case sum != l.SHA256 || size != l.Bytes:
			say("%s: its bytes are not those that were written", l.File)
		}
		rep.Records += l.Records
		rep.Bytes += l.Bytes
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.age"))
	if err != nil {
		return rep, err
	}
	for _, f := range files {
		if f = filepath.Base(f); f != openFile && !known[f] {
			say("%s: is not in the chain", f)
		}
	}
	return rep, nil
}

// Segments are those of a folder, oldest first.
func Segments(dir string) ([]Link, error) {
	c, err := loadChain(dir)
	return c.live(), err
}

// ErrStop ends Each without an error.
var ErrStop = errors.New("stop")

// Each decrypts the records of a folder, oldest first. The end that a cut
// segment lacks is no error.
func Each(dir string, ids []age.Identity, f func(*Record) error) error {
	segs, err := Segments(dir)
	if err != nil {
		return err
	}
	for _, l := range segs {
		if err := eachOf(filepath.Join(dir, l.File), l, ids, f); err != nil {
			if errors.Is(err, ErrStop) {
				return nil
			}
			return fmt.Errorf("%s: %w", l.File, err)
		}
	}
	return nil
}

func eachOf(path string, l Link, ids []age.Identity, f func(*Record) error) error {
	sum, _, err := hashFile(path)
	if err != nil {
		return err
	}
	if sum != l.SHA256 {
		return errors.New("its bytes are not those that were written")
	}
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	plain, err := age.Decrypt(bufio.NewReader(file), ids...)
	if err != nil {
		return err
	}
	var own error
	err = readRecords(plain, func(r *Record) error {
		own = f(r)
		return own
	})
	if own != nil {
		return own
	}
	if l.Cut {
		return nil // what there is of it was read, and it is what was written
	}
	return err
}

// maxRecord bounds one record, bytes: two messages and what they grow by.
const maxRecord = 512 << 20

// readRecords reads records as they are compressed.
func readRecords(r io.Reader, f func(*Record) error) error {
	z, err := gzip.NewReader(r)
	if err != nil {
		return err
	}
	return ReadRecords(z, f)
}

// ReadRecords reads records, one a line.
func ReadRecords(r io.Reader, f func(*Record) error) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxRecord)
	for n := 1; s.Scan(); n++ {
		var rec Record
		if err := json.Unmarshal(s.Bytes(), &rec); err != nil {
			return fmt.Errorf("record %d: %w", n, err)
		}
		if err := f(&rec); err != nil {
			return err
		}
	}
	return s.Err()
}

// NewAuditor writes a new private key of an auditor to a file that must not
// exist yet, and returns its public key, a recipient of archives.
func NewAuditor(file string) (recipient string, err error) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		return "", err
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	_, err = fmt.Fprintf(f, "# public key: %s\n%s\n", key.Recipient(), key)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", err
	}
	return key.Recipient().String(), nil
}

// ReadIdentities reads the identity files of an auditor, as age-keygen writes
// them.
func ReadIdentities(paths ...string) (ids []age.Identity, err error) {
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			return nil, err
		}
		some, err := age.ParseIdentities(f)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", p, err)
		}
		ids = append(ids, some...)
	}
	return slices.Clip(ids), nil
}
