package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// Files of an archive beside its segments.
const (
	chainFile = "chain.jsonl"
	headFile  = "head"
	keyFile   = "archive.vkey"
	openFile  = "open.age" // the segment that is being written
)

// A Link is one line of the chain: a segment that was closed, or what retention
// has removed. It names the line before by its hash, so that none can be changed
// or left out without all that follow.
type Link struct {
	Seq  uint64    `json:"seq"`
	Time time.Time `json:"time"`
	Prev string    `json:"prev"`
	// File is the segment, with the hash of its bytes as they are on the disk.
	File    string `json:"file,omitempty"`
	SHA256  string `json:"sha256,omitempty"`
	Bytes   int64  `json:"bytes,omitempty"`
	Records int    `json:"records,omitempty"`
	// First and Last are the times of its records.
	First time.Time `json:"first,omitzero"`
	Last  time.Time `json:"last,omitzero"`
	// Cut says that the process ended, or the disk was full, before it was
	// closed: its end is missing.
	Cut        bool     `json:"cut,omitempty"`
	Recipients []string `json:"recipients,omitempty"`
	// Removed are segments that retention has removed.
	Removed []string `json:"removed,omitempty"`
}

// A Head is the end of a chain, as it is signed.
type Head struct {
	Origin string
	Size   uint64
	Root   [32]byte
}

// A chain is what is read of it.
type chain struct {
	links []Link
	last  [32]byte // the hash of the last line
}

const maxLine = 64 << 10 // bytes; a line that removes many segments is split

// readChain reads and checks the lines.
func readChain(r io.Reader) (c chain, err error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return c, err
	}
	for n := 1; len(b) > 0; n++ {
		line, rest, whole := bytes.Cut(b, []byte("\n"))
		if !whole {
			return c, fmt.Errorf("%s: line %d: %w", chainFile, n, io.ErrUnexpectedEOF)
		}
		b = rest
		if len(line) > maxLine {
			return c, fmt.Errorf("%s: line %d has %d bytes, at most %d", chainFile, n, len(line), maxLine)
		}
		var l Link
		if err := json.Unmarshal(line, &l); err != nil {
			return c, fmt.Errorf("%s: line %d: %w", chainFile, n, err)
		}
		if err := c.takes(l); err != nil {
			return c, fmt.Errorf("%s: line %d: %w", chainFile, n, err)
		}
		c.links = append(c.links, l)
		c.last = sha256.Sum256(line)
	}
	return c, nil
}

// takes says whether l may follow.
func (c *chain) takes(l Link) error {
	if l.Seq != uint64(len(c.links))+1 {
		return fmt.Errorf("it has the number %d", l.Seq)
	}
	if l.Prev != hex.EncodeToString(c.last[:]) {
		return errors.New("it does not follow the line before")
	}
	if l.File != "" && !goodFile(l.File) {
		return fmt.Errorf("%q is no name of a segment", l.File)
	}
	for _, f := range l.Removed {
		if !goodFile(f) {
			return fmt.Errorf("%q is no name of a segment", f)
		}
	}
	return nil
}

// goodFile keeps a chain from naming what is not in its folder.
func goodFile(name string) bool {
	return filepath.Base(name) == name && filepath.Ext(name) == ".age" && name != openFile
}

// next is the line that l becomes.
func (c *chain) next(l *Link) ([]byte, error) {
	l.Seq, l.Prev = uint64(len(c.links))+1, hex.EncodeToString(c.last[:])
	b, err := json.Marshal(l)
	return append(b, '\n'), err
}

// took makes l the last link.
func (c *chain) took(l Link, line []byte) {
	c.links = append(c.links, l)
	c.last = sha256.Sum256(line[:len(line)-1])
}

// head is what is signed.
func (c *chain) head(origin string) Head {
	return Head{Origin: origin, Size: uint64(len(c.links)), Root: c.last}
}

// live are the segments that are there.
func (c *chain) live() (out []Link) {
	gone := map[string]bool{}
	for _, l := range c.links {
		for _, f := range l.Removed {
			gone[f] = true
		}
	}
	for _, l := range c.links {
		if l.File != "" && !gone[l.File] {
			out = append(out, l)
		}
	}
	return out
}

// loadChain reads the chain of a folder; without one it is empty.
func loadChain(dir string) (chain, error) {
	f, err := os.Open(filepath.Join(dir, chainFile))
	if errors.Is(err, fs.ErrNotExist) {
		return chain{}, nil
	}
	if err != nil {
		return chain{}, err
	}
	defer f.Close()
	return readChain(f)
}

// hashFile is the SHA-256 of a file, and its size.
func hashFile(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// replaceFile puts b in the place of a file, whole or not at all.
func replaceFile(path string, b []byte) error {
	tmp := path + ".tmp"
	if err := writeSynced(tmp, b); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func writeSynced(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
