package shadow

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"io"
	"os"
	"sync"
)

// inline is how much of a message stays in memory, bytes: nearly all calls are
// smaller, and never see a file.
const inline = 256 << 10

// A tape is one message as it was written: in memory, and what is beyond inline
// in a file without a name. What is in the file is encrypted with a key that is
// nowhere but in this process, since nothing of it was redacted.
type tape struct {
	m *Mirror

	mu     sync.Mutex // guards the fields below
	buf    []byte     // the newest bytes
	queued [][]byte   // older ones, on their way to the file
	size   int64
	gone   string // why it is lost, an outcome
	ended  bool   // released

	file    *os.File
	stream  cipher.Stream
	block   cipher.Block
	filed   int64 // bytes in file, or being written there
	writing bool  // a spill is under way, or asked for
	written *sync.Cond
}

func (m *Mirror) tape() *tape {
	t := &tape{m: m}
	t.written = sync.NewCond(&t.mu)
	return t
}

// add takes a copy of b. It waits for nothing but the lock, which nobody holds
// for long.
func (t *tape) add(b []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	switch {
	case t.gone != "" || t.ended:
		return
	case t.size+int64(len(b)) > t.m.cfg.Message:
		t.drop(outcomeTooLarge)
		return
	case !t.m.memory.Take(len(b)):
		t.drop(outcomeNoRoom)
		return
	}
	t.size += int64(len(b))
	t.buf = append(t.buf, b...)
	if len(t.buf) < inline {
		return
	}
	if t.m.cfg.Spill == 0 || !t.m.disk.Take(len(t.buf)) {
		if t.file == nil && t.size <= t.m.cfg.Memory/8 {
			return // it may stay in memory
		}
		t.drop(outcomeNoRoom)
		return
	}
	t.filed += int64(len(t.buf))
	t.queued = append(t.queued, t.buf)
	t.buf = nil
	if t.writing {
		return
	}
	select {
	case t.m.spills <- t:
		t.writing = true
	default:
		t.drop(outcomeNoRoom)
	}
}

// drop loses the message. The caller holds the lock.
func (t *tape) drop(why string) {
	t.gone = why
	t.empty()
}

// empty gives back what is held in memory. The caller holds the lock.
func (t *tape) empty() {
	held := len(t.buf)
	for _, b := range t.queued {
		held += len(b)
	}
	t.m.memory.Give(held)
	t.buf, t.queued = nil, nil
}

// lose loses the message, if it is not lost already.
func (t *tape) lose(why string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.gone == "" {
		t.drop(why)
	}
}

// lost says why the message is lost; empty when it is not.
func (t *tape) lost() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.gone
}

// length is how many bytes were added.
func (t *tape) length() int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.size
}

// rewind forgets what was added.
func (t *tape) rewind() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.size == 0 && t.gone == "" {
		return
	}
	if t.filed > 0 {
		t.drop(outcomeCut) // the file may be in use; such a request is not sent twice either
		return
	}
	t.empty()
	t.size, t.gone = 0, ""
}

// spill writes what is queued to the file. It is called by Run alone.
func (t *tape) spill() {
	t.mu.Lock()
	for t.gone == "" && !t.ended && len(t.queued) > 0 {
		q := t.queued
		t.queued = nil
		t.mu.Unlock()
		err := t.write(q)
		t.mu.Lock()
		for _, b := range q {
			t.m.memory.Give(len(b))
		}
		if err != nil {
			t.m.cfg.Log.Warn("a copy of a call cannot be kept in a file", "err", err)
			t.drop(outcomeNoRoom)
		}
	}
	t.writing = false
	t.written.Broadcast()
	ended := t.ended
	t.mu.Unlock()
	if ended {
		t.close()
	}
}

func (t *tape) write(q [][]byte) error {
	if t.file == nil {
		f, err := os.CreateTemp(t.m.cfg.Dir, "copy-")
		if err != nil {
			return err
		}
		if err := os.Remove(f.Name()); err != nil {
			f.Close()
			return err
		}
		var key [32]byte
		_, _ = rand.Read(key[:])
		if t.block, err = aes.NewCipher(key[:]); err != nil {
			f.Close()
			return err
		}
		t.stream = cipher.NewCTR(t.block, make([]byte, aes.BlockSize))
		t.file = f
	}
	for _, b := range q {
		t.stream.XORKeyStream(b, b)
		if _, err := t.file.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// reader reads the message from its beginning; nil when it is lost. Nothing is
// added any more.
func (t *tape) reader() io.Reader {
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.writing {
		t.written.Wait()
	}
	if t.gone != "" {
		return nil
	}
	rest := bytes.NewReader(t.buf)
	if t.filed == 0 {
		return rest
	}
	plain := cipher.StreamReader{S: cipher.NewCTR(t.block, make([]byte, aes.BlockSize)), R: io.NewSectionReader(t.file, 0, t.filed)}
	return io.MultiReader(plain, rest)
}

// release gives everything back.
func (t *tape) release() {
	t.mu.Lock()
	if t.ended {
		t.mu.Unlock()
		return
	}
	t.ended = true
	t.empty()
	busy := t.writing
	t.mu.Unlock()
	if !busy {
		t.close()
	}
}

// close closes the file, once nobody writes to it.
func (t *tape) close() {
	t.m.disk.Give(int(t.filed))
	if t.file != nil {
		t.file.Close()
		t.file = nil
	}
}
