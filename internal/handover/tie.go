package handover

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/audit"
)

// A Want says who takes over, and from whom.
type Want struct {
	// Path is the socket of the process that runs. Required.
	Path string
	// Program and DataDir must be the same for both. Required.
	Program, DataDir string
	// Log is for operators. Required.
	Log *slog.Logger
}

// A Tie holds a new process to the one that it takes over from, which writes
// its audit records. It is an audit.Writer.
type Tie struct {
	c     *net.UnixConn
	log   *slog.Logger
	doors *Doors
	head  uint64

	gone chan struct{} // closed when the other process writes no more
	over sync.Once

	// asking is the right to ask: the answers come in order. parted is guarded
	// by it.
	asking  sync.Mutex
	parted  bool
	answers chan message
}

// ErrNobody is returned by Take when no process runs.
var ErrNobody = errors.New("no process runs there")

// Take asks the process that runs for its sockets. It goes on serving until
// Ready.
func Take(w Want) (*Tie, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: w.Path, Net: "unix"})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("%s: %w", w.Path, ErrNobody)
	}
	if err != nil {
		return nil, fmt.Errorf("take over: %w", err)
	}
	t := &Tie{c: c, log: w.Log, gone: make(chan struct{}), answers: make(chan message, 1)}
	if err := t.greet(w); err != nil {
		c.Close()
		return nil, fmt.Errorf("take over from the process at %s: %w", w.Path, err)
	}
	go t.listen()
	return t, nil
}

func (t *Tie) greet(w Want) error {
	if _, err := ownUser(t.c); err != nil {
		return err
	}
	_ = t.c.SetDeadline(time.Now().Add(helloWithin))
	if err := write(t.c, message{Op: opHello, Version: version, Program: w.Program, DataDir: w.DataDir}); err != nil {
		return err
	}
	in := &rights{c: t.c}
	m, err := read(in)
	if err == nil && (m.Op != opDoors || m.Err != "") {
		err = fmt.Errorf("it refuses: %.500s", m.Err)
	}
	if err != nil {
		closeAll(in.fds)
		return err
	}
	if t.doors, err = receive(m.Doors, in.fds); err != nil {
		return err
	}
	t.head = m.Seq
	return t.c.SetDeadline(time.Time{})
}

// rights reads bytes and keeps the descriptors that come with them.
type rights struct {
	c   *net.UnixConn
	fds []int
}

func (r *rights) Read(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxDoors))
	n, on, flags, _, err := r.c.ReadMsgUnix(b, oob)
	if err != nil {
		return n, err
	}
	ms, err := unix.ParseSocketControlMessage(oob[:on])
	if err != nil {
		return 0, err
	}
	for _, m := range ms {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return 0, err
		}
		r.fds = append(r.fds, fds...)
	}
	if flags&unix.MSG_CTRUNC != 0 {
		return 0, errors.New("more sockets came than there was room for")
	}
	return n, nil
}

// Doors are the sockets of the process before.
func (t *Tie) Doors() *Doors { return t.doors }

// Head is how many records the audit log had when the process was asked.
func (t *Tie) Head() uint64 { return t.head }

// Gone is closed when the other process writes no more: then what only one may
// have is to be had.
func (t *Tie) Gone() <-chan struct{} { return t.gone }

// listen takes what the other process says.
func (t *Tie) listen() {
	for {
		m, err := read(t.c)
		if err != nil {
			t.end()
			return
		}
		if m.Op == opPart {
			go t.part()
			continue
		}
		select {
		case t.answers <- m:
		case <-t.gone:
			return
		}
	}
}

// part sends no more records, once the last one is answered, and says so.
func (t *Tie) part() {
	t.asking.Lock()
	defer t.asking.Unlock()
	t.parted = true
	_ = write(t.c, message{Op: opParted})
	t.end()
}

func (t *Tie) end() {
	t.over.Do(func() {
		close(t.gone)
		t.c.Close()
	})
}

// ask sends a message and waits for the answer.
func (t *Tie) ask(m message) (message, error) {
	t.asking.Lock()
	defer t.asking.Unlock()
	if t.parted {
		return message{}, audit.ErrGone
	}
	_ = t.c.SetWriteDeadline(time.Now().Add(answerWithin))
	if err := write(t.c, m); err != nil {
		t.end()
		return message{}, audit.ErrGone
	}
	timer := time.NewTimer(answerWithin)
	defer timer.Stop()
	select {
	case a := <-t.answers:
		if a.Op != opAnswer {
			t.end()
			return message{}, audit.ErrGone
		}
		return a, nil
	case <-t.gone:
	case <-timer.C:
		t.log.Error("the process before does not answer", "within", answerWithin)
		t.end()
	}
	return message{}, audit.ErrGone
}

// Append is audit.Writer.
func (t *Tie) Append(r *audit.Record) error {
	sent := *r
	sent.Tally = audit.Tally{}
	a, err := t.ask(message{Op: opAppend, Record: &sent})
	if err != nil {
		return err
	}
	if a.Record != nil {
		r.Seq, r.Time, r.ID = a.Record.Seq, a.Record.Time, a.Record.ID
	}
	return failure(a)
}

// Sync is audit.Writer.
func (t *Tie) Sync(context.Context) (uint64, error) {
	a, err := t.ask(message{Op: opSync})
	if err != nil {
		return 0, err
	}
	return a.Seq, failure(a)
}

// Ready tells the other process that this one serves. When it returns, the
// other accepts nothing more.
func (t *Tie) Ready() error {
	a, err := t.ask(message{Op: opReady})
	if err == nil {
		err = failure(a)
	}
	if err != nil {
		return fmt.Errorf("take over: %w", err)
	}
	return nil
}

// Stop has the other process stop as well.
func (t *Tie) Stop() { _, _ = t.ask(message{Op: opStop}) }

// Close ends the tie: the other process serves on.
func (t *Tie) Close() { t.end() }

func failure(a message) error {
	if a.Err == "" {
		return nil
	}
	return errors.New(a.Err)
}
