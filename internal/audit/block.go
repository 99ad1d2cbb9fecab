package audit

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"

	"golang.org/x/mod/sumdb/tlog"
)

// blockSize is how much of a log one goroutine parses and hashes at a time. It
// is more than the longest line.
const blockSize = 256 << 10

// A read is a line of a log that was parsed and hashed.
type read struct {
	rec       Record // when err is nil
	prev, sum hash
	leaf      tlog.Hash // of the tree, when that was asked for
	err       error
}

// A block is whole lines of a log.
type block struct {
	b      []byte
	lines  []read
	leaves bool // are wanted
	// long: before the first of them ends one that is longer than a block.
	long bool
	// torn: after the last of them the log ends within one.
	torn bool
	err  error
	done chan struct{}
}

// readBlocks calls line with each line of a log in order, with its leaf of the
// tree if leaves is set, and torn when the last one has no end. All processors parse and hash; the calls come from this
// goroutine. Those it starts end before it returns.
func readBlocks(r io.Reader, leaves bool, line func(*read), torn func()) error {
	order := make(chan *block, 2*runtime.GOMAXPROCS(0))
	go cutBlocks(r, leaves, order)
	var err error
	for b := range order {
		<-b.done
		if b.err != nil {
			err = b.err
		}
		if b.long {
			line(&read{err: errors.New("longer than any record")})
		}
		for i := range b.lines {
			line(&b.lines[i])
		}
		if b.torn {
			torn()
		}
	}
	return err
}

// cutBlocks reads a log and has its blocks parsed.
func cutBlocks(r io.Reader, leaves bool, order chan<- *block) {
	defer close(order)
	var carry []byte
	long := false // the beginning of a line was too long to be carried on
	for {
		buf := make([]byte, blockSize)
		n := copy(buf, carry)
		more, err := io.ReadFull(r, buf[n:])
		buf = buf[:n+more]
		b := &block{leaves: leaves, done: make(chan struct{})}
		if end := bytes.IndexByte(buf, '\n') + 1; long && end > 0 {
			b.long, long, buf = true, false, buf[end:]
		}
		end := bytes.LastIndexByte(buf, '\n') + 1
		b.b, carry = buf[:end], buf[end:]
		if long = long || len(carry) > maxLine; long {
			carry = nil
		}
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		switch {
		case last && long:
			b.long, b.torn = true, true
		case last:
			b.torn = len(carry) > 0
		default:
			b.err = err
		}
		go b.parse()
		if order <- b; err != nil {
			return
		}
	}
}

func (b *block) parse() {
	defer close(b.done)
	text := string(b.b) // all records of the block hold it
	b.lines = make([]read, bytes.Count(b.b, []byte("\n")))
	for i, at := 0, 0; i < len(b.lines); i++ {
		n := bytes.IndexByte(b.b[at:], '\n') + 1
		l := &b.lines[i]
		if l.sum = sha256.Sum256(b.b[at : at+n]); b.leaves {
			l.leaf = tlog.RecordHash(b.b[at : at+n])
		}
		if n > maxLine {
			l.err = fmt.Errorf("line of %d bytes is longer than any record", n)
		} else {
			l.rec, l.prev, l.err = parseLine(text[at : at+n])
		}
		at += n
	}
	b.b = nil
}
