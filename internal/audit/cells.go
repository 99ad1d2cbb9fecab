package audit

import (
	"encoding/binary"
	"errors"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
)

// The counts stand in a file that is mapped into memory: a header and cells of
// one KiB, each for one kind of call. A number that was written is in the
// file whatever becomes of the process.
const (
	tableMagic = 0x53_50_43_4f_55_4e_54_01 // "SPCOUNT", version 1
	headWords  = 512
	cellWords  = 128
	maxCells   = 4096
	tableWords = headWords + maxCells*cellWords

	// Of the header.
	hMagic       = 0
	hBoot        = 1 // a hash of the kernel's boot id
	hFrom        = 2 // the record after which the last telling began
	hGen         = 3 // the last generation given to a cell
	hLost        = 4 // records that could not be kept, of calls that went on
	hTold        = 5 // how many of them a gap record speaks of
	hClean       = 6 // 1 when the process ended in order
	hRefused     = 7 // records that were refused with what they stood for
	hRefusedTold = 8 // how many of them a gap record speaks of

	// Of a cell.
	cGen     = 0 // 0 when the cell is free; written last
	cDecided = 1
	cSettled = 2 // by class
	cTold    = cSettled + classes
	cFrom    = cTold + classes // nanoseconds, 0 when nothing was counted since
	cMark    = cFrom + 1       // by class: what its trace is
	cTrace   = cMark + classes // by class
	cText    = cTrace + classes*traceWords
	textSize = (cellWords - cText) * 8

	traceWords = 4 // a trace id has 32 characters
)

const (
	classNone = 0
	class4xx  = 4
	classLost = 6
	classes   = 7
)

var classNames = [classes]string{"none", "1xx", "2xx", "3xx", "4xx", "5xx", "lost"}

func classOf(status int) int {
	if status < 100 || status > 599 {
		return classNone
	}
	return status / 100
}

// Class is how a roll-up names the end of a call: by the status that the
// caller was told.
func Class(status int) string { return classNames[classOf(status)] }

// what is the family of events that a cell counts.
type what uint8

const (
	whole    what = iota // not counted
	allowed              // calls that were allowed
	denied               // calls that were refused, by the path
	turned               // refusals on the way out: no path, no destination
	insecure             // failed handshakes
	failed               // calls that were allowed and came to nothing
	gained               // calls that a candidate alone would allow
	lost                 // calls that a candidate alone would refuse
)

// counted says if events are only counted but for the first of their kind.
func (w what) counted() bool { return w == allowed || w.shadow() }

// shadow says if it is not the calls that are counted but a difference.
func (w what) shadow() bool { return w == gained || w == lost }

// cellKey is what the events of a cell have in common.
type cellKey struct {
	what                               what
	port                               uint16
	src, dst, rule, reason, verb, path string
}

func (k *cellKey) record() Record {
	r := Record{Kind: KindRollup, Decision: Allow, Src: k.src, Dst: k.dst, Rule: k.rule, Reason: k.reason, Verb: k.verb, Path: k.path, Port: k.port, Dir: "in"}
	switch k.what {
	case denied:
		r.Decision = Deny
	case turned:
		r.Decision, r.Dir = Deny, "out"
	case insecure:
		r.Decision, r.Detail = Deny, "handshakes"
	case failed:
		r.Detail = "failed calls"
	case gained, lost:
		r.Detail = "candidate"
		if k.what == lost {
			r.Decision = Deny
		}
		if k.dst == "" {
			r.Dir = "out"
		}
	}
	return r
}

// clone gives the key texts of its own.
func (k cellKey) clone() cellKey {
	for _, s := range []*string{&k.src, &k.dst, &k.rule, &k.reason, &k.verb, &k.path} {
		*s = strings.Clone(*s)
	}
	return k
}

// appendTo writes the key into the file.
func (k *cellKey) appendTo(b []byte) []byte {
	b = append(b, byte(k.what))
	b = binary.LittleEndian.AppendUint16(b, k.port)
	for _, s := range []string{k.src, k.dst, k.rule, k.reason, k.verb, k.path} {
		b = binary.AppendUvarint(b, uint64(len(s)))
		b = append(b, s...)
	}
	return b
}

// errNoCell is returned for a difference that would have to be kept by itself.
var errNoCell = errors.New("no cell is free to count it")

var errNotAKey = errors.New("a cell of the counts holds no key")

func parseKey(b []byte) (k cellKey, err error) {
	if len(b) < 3 || b[0] == 0 || what(b[0]) > lost {
		return k, errNotAKey
	}
	k.what, k.port, b = what(b[0]), binary.LittleEndian.Uint16(b[1:]), b[3:]
	for _, s := range []*string{&k.src, &k.dst, &k.rule, &k.reason, &k.verb, &k.path} {
		n, used := binary.Uvarint(b)
		if used <= 0 || n > uint64(len(b)-used) {
			return k, errNotAKey
		}
		*s, b = string(b[used:used+int(n)]), b[used+int(n):]
	}
	return k, nil
}

// A cell counts the events with one key. w and text are in the file; what
// else is here is guarded by the shard's lock.
type cell struct {
	key   cellKey
	id    string
	index int
	w     []uint64
	text  []byte

	// budget is how many more events of this window are kept in full, skipped
	// how many were not since the last that was.
	budget, skipped int
	// fresh asks for the next event in full: the first of its kind in a day.
	fresh bool
	// pins counts events on their way into the log, idle the windows without
	// one.
	pins, idle int
}

// cellID names a cell for as long as it counts the same.
func cellID(nonce string, index int, gen uint64) string {
	return nonce + "c" + strconv.FormatUint(uint64(index), 16) + "." + strconv.FormatUint(gen, 16)
}

// cellOf reads an id that cellID made.
func cellOf(id string) (index int, gen uint64, ok bool) {
	_, rest, ok := strings.Cut(id, "-c")
	if !ok {
		return 0, 0, false
	}
	i, g, ok := strings.Cut(rest, ".")
	if !ok {
		return 0, 0, false
	}
	n, err1 := strconv.ParseUint(i, 16, 32)
	gen, err2 := strconv.ParseUint(g, 16, 64)
	return int(n), gen, err1 == nil && err2 == nil && n < maxCells && gen > 0
}

func (c *cell) load(i int) uint64 { return atomic.LoadUint64(&c.w[i]) }

func (c *cell) store(i int, v uint64) { atomic.StoreUint64(&c.w[i], v) }

// settle counts the end of one event.
func (c *cell) settle(class int, trace string) {
	if mark := c.load(cMark + class); len(trace) == traceWords*8 && (mark == noTrace || mark == oldTrace) &&
		atomic.CompareAndSwapUint64(&c.w[cMark+class], mark, newTrace|writing) {
		at := cTrace + class*traceWords
		for i := range traceWords {
			c.store(at+i, leWord(trace[i*8:]))
		}
		c.store(cMark+class, newTrace)
	}
	atomic.AddUint64(&c.w[cSettled+class], 1)
}

// What the trace of a class is.
const (
	noTrace  = 0
	newTrace = 1 // of an event that was not told yet
	oldTrace = 2 // of the last one that was
	writing  = 4
)

// leWord is the number that eight bytes make.
func leWord(s string) (n uint64) {
	for i := range 8 {
		n |= uint64(s[i]) << (8 * i)
	}
	return n
}

// trace is the trace of one event of the class, empty when there is none. It
// makes room for that of a later one.
func (c *cell) trace(class int) string {
	for range 100 {
		mark := c.load(cMark + class)
		if mark == noTrace {
			return ""
		}
		var b []byte
		for i := range traceWords {
			b = binary.LittleEndian.AppendUint64(b, c.load(cTrace+class*traceWords+i))
		}
		if mark&writing == 0 && atomic.CompareAndSwapUint64(&c.w[cMark+class], mark, oldTrace) {
			return string(b)
		}
		runtime.Gosched() // an event leaves its own just now
	}
	return ""
}

func (c *cell) settled() (n uint64) {
	for class := range classes {
		n += c.load(cSettled + class)
	}
	return n
}

// A Tally is told how a call ended that a Ledger counts. The zero Tally counts
// nothing.
type Tally struct{ c *cell }

// Done counts the end of the call: the status that the caller was told, 0 when
// it was told nothing. It is called once.
func (t Tally) Done(status int, trace string) {
	if t.c != nil {
		t.c.settle(classOf(status), trace)
	}
}
