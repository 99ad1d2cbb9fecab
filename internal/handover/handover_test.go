package handover

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sallyport/internal/audit"
	"sallyport/internal/daemon"
)

var quiet = slog.New(slog.DiscardHandler)

// A process is one side of a handover in the test's own process.
type process struct {
	keeper *Keeper
	path   string
	log    *audit.Log
	stops  atomic.Bool // it knows that it is to stop
}

// running has a process that may be taken over from.
func running(t *testing.T, may error) *process {
	t.Helper()
	dir, err := os.MkdirTemp("", "sp-") // t.TempDir is too long a path for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &process{path: filepath.Join(dir, Socket), log: audit.NewMemory()}
	l, err := audit.NewMemoryLedger(p.log, audit.LedgerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	p.keeper = &Keeper{
		Program: "sidecar", DataDir: "/data", Doors: new(Doors), Writer: l.Writer(), Head: l.Head, Log: quiet,
		May: func() error {
			if p.stops.Load() {
				return errors.New("this process is stopping")
			}
			return may
		}, Stop: func() {},
	}
	ln, err := daemon.ListenPrivate(p.path, quiet)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- p.keeper.Run(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return p
}

func (p *process) want() Want {
	return Want{Path: p.path, Program: "sidecar", DataDir: "/data", Log: quiet}
}

// answerAll answers each connection of a door with a word, and closes it.
func answerAll(ln net.Listener, word string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		_, _ = io.WriteString(c, word)
		c.Close()
	}
}

func TestNoConnectionIsLostBetweenTwo(t *testing.T) {
	p := running(t, nil)
	ln, err := p.keeper.Doors.TCP("listen", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	go answerAll(ln, "old")
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var old, young atomic.Int64
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				c, err := net.Dial("tcp", ln.Addr().String())
				if err != nil {
					t.Error(err)
					return
				}
				b, err := io.ReadAll(c)
				c.Close()
				switch {
				case string(b) == "old":
					old.Add(1)
				case string(b) == "new":
					young.Add(1)
				default:
					t.Errorf("a connection got %q, %v", b, err)
				}
			}
		})
	}
	await := func(n *atomic.Int64) {
		for from := n.Load(); n.Load() < from+20 && !t.Failed(); {
			<-time.After(time.Millisecond)
		}
	}
	for range 5 {
		await(&old)
		tie, err := Take(p.want())
		if err != nil {
			t.Fatal(err)
		}
		next, err := tie.Doors().TCP("listen", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if next.Addr().String() != ln.Addr().String() {
			t.Fatalf("another socket: %s, want %s", next.Addr(), ln.Addr())
		}
		go answerAll(next, "new")
		ready := make(chan error, 1)
		go func() { ready <- tie.Ready() }()
		s := <-p.keeper.Taken()
		if err := <-ready; err != nil {
			t.Fatal(err)
		}
		before := old.Load()
		tie.Doors().Release()
		await(&young)
		if n := old.Load() - before; n > 4 { // which were on their way
			t.Errorf("the old one accepted %d connections after it was replaced", n)
		}
		tie.Doors().hold() // so that the socket is not closed with one in its hands
		tie.Close()
		if !s.Finish(t.Context(), time.Minute, func() int { return 1 }) {
			t.Error("nobody saw the new one go")
		}
		p.keeper.Doors.Release()
	}
	await(&old)
	close(stop)
	wg.Wait()
	t.Logf("%d and %d connections, none lost", old.Load(), young.Load())
}

// A process that was asked to stop after it gave its sockets away serves on
// until it ends: nobody receives from Taken then.
func TestDoorsOfOneThatStopsAreNotHeld(t *testing.T) {
	for _, tt := range []struct {
		name  string
		knows bool
	}{
		{"it knows", true},
		{"nobody listens", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := running(t, nil)
			ln, err := p.keeper.Doors.TCP("listen", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			go answerAll(ln, "old")
			tie, err := Take(p.want())
			if err != nil {
				t.Fatal(err)
			}
			defer tie.Doors().Rest()
			defer tie.Close()
			p.stops.Store(tt.knows)
			if err := tie.Ready(); err == nil || !strings.Contains(err.Error(), "is stopping") {
				t.Errorf("the other learns %v", err)
			}
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			_ = c.SetReadDeadline(time.Now().Add(time.Minute))
			if b, err := io.ReadAll(c); string(b) != "old" {
				t.Errorf("a connection gets %q, %v", b, err)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for name, tt := range map[string]struct {
		may    error
		change func(*Want)
		want   string
	}{
		"another program":              {nil, func(w *Want) { w.Program = "gateway" }, `it is a "gateway", this is a sidecar`},
		"another data_dir":             {nil, func(w *Want) { w.DataDir = "/other" }, "its data_dir is"},
		"one that may not be replaced": {errors.New("it is stopping"), func(*Want) {}, "it is stopping"},
	} {
		t.Run(name, func(t *testing.T) {
			p := running(t, tt.may)
			w := p.want()
			tt.change(&w)
			if _, err := Take(w); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	t.Run("nobody runs", func(t *testing.T) {
		w := running(t, nil).want()
		w.Path += "-2"
		if _, err := Take(w); !errors.Is(err, ErrNobody) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("a second one at a time", func(t *testing.T) {
		p := running(t, nil)
		first, err := Take(p.want())
		if err != nil {
			t.Fatal(err)
		}
		defer first.Close()
		if _, err := Take(p.want()); err == nil || !strings.Contains(err.Error(), "already") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("another version, and what is no message", func(t *testing.T) {
		p := running(t, nil)
		for _, say := range []string{"\x00\x00\x00\x1c{\"op\":\"hello\",\"version\":99 }", "\xff\xff\xff\xff", "GET / HTTP/1.1\r\n\r\n"} {
			c, err := net.Dial("unix", p.path)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(c, say)
			if m, err := read(c); err == nil && (m.Err == "" || len(m.Doors) > 0) {
				t.Errorf("%q: answered %+v", say, m)
			}
			c.Close()
		}
	})
}

// A record is written by the process before until that parts: then by nobody
// else, and none is lost in between.
func TestRecordsGoThroughTheOldOne(t *testing.T) {
	p := running(t, nil)
	tie, err := Take(p.want())
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = tie.Ready() }()
	s := <-p.keeper.Taken()
	var kept, refused atomic.Uint64
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				r := audit.Record{Kind: audit.KindAdmin, Detail: "x"}
				err := tie.Append(&r)
				switch {
				case err == nil && r.Seq > 0 && r.ID != "":
					kept.Add(1)
				case errors.Is(err, audit.ErrGone):
					refused.Add(1)
					return
				default:
					t.Errorf("%+v: %v", r, err)
					return
				}
			}
		})
	}
	for kept.Load() < 100 && !t.Failed() {
		<-time.After(time.Millisecond)
	}
	s.Leave()
	head, _ := p.log.Head()
	wg.Wait()
	<-tie.Gone()
	if after, _ := p.log.Head(); head != after || kept.Load() != head || refused.Load() != 4 {
		t.Errorf("%d records when it left, %d now, %d acknowledged, %d writers told", head, after, kept.Load(), refused.Load())
	}
}

// Both read one socket, and only one at a time.
func TestDatagramsWaitForTheOneThatReads(t *testing.T) {
	p := running(t, nil)
	var beside []bool
	p.keeper.Doors.Beside(func(held bool) { beside = append(beside, held) })
	ln, old, err := p.keeper.Doors.UDP("names", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("udp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	in := make([]byte, 16)
	read := func(from *net.UDPConn, want string) {
		t.Helper()
		if n, err := from.Read(in); err != nil || string(in[:n]) != want {
			t.Errorf("%q, %v, want %q", in[:n], err, want)
		}
	}
	say := func(word string) {
		t.Helper()
		if _, err := io.WriteString(c, word); err != nil {
			t.Fatal(err)
		}
	}
	tie, err := Take(p.want())
	if err != nil {
		t.Fatal(err)
	}
	next, young, err := tie.Doors().UDP("names", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer next.Close()
	if next.Addr().String() != ln.Addr().String() {
		t.Fatalf("another socket: %s, want %s", next.Addr(), ln.Addr())
	}
	if _, err := young.Read(in); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the new one reads before the old one yields: %v", err)
	}
	say("one")
	read(old, "one")
	ready := make(chan error, 1)
	go func() { ready <- tie.Ready() }()
	<-p.keeper.Taken()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	say("two")
	if _, err := old.Read(in); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the old one reads on: %v", err)
	}
	var told []bool
	tie.Doors().Beside(func(held bool) { told = append(told, held) })
	tie.Doors().Release()
	read(young, "two")
	tie.Close()
	p.keeper.Doors.Release()
	say("three")
	read(old, "three")
	if want := []bool{true, false}; !slices.Equal(beside, want) || !slices.Equal(told, want) {
		t.Errorf("beside the doors %v and %v were told, want %v", beside, told, want)
	}
}

// What comes as a socket is looked at, and closed when it is none.
func TestOnlyListeningSocketsAreTaken(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	listening := func() int {
		fd, err := (&Door{Listener: ln.(*net.TCPListener)}).dup()
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	socket := func(kind int) int {
		fd, err := unix.Socket(unix.AF_INET, kind, 0)
		if err != nil {
			t.Fatal(err)
		}
		return fd
	}
	pipe := func() int {
		var p [2]int
		if err := unix.Pipe(p[:]); err != nil {
			t.Fatal(err)
		}
		unix.Close(p[1])
		return p[0]
	}
	a, b := name{"a", "x"}, name{"b", "y"}
	for what, tt := range map[string]struct {
		names []name
		fds   []int
	}{
		"a socket that does not listen": {[]name{a}, []int{socket(unix.SOCK_STREAM)}},
		"a datagram socket":             {[]name{a}, []int{socket(unix.SOCK_DGRAM)}},
		"a pipe beside a socket":        {[]name{a, b}, []int{listening(), pipe()}},
		"fewer names":                   {[]name{a}, []int{listening(), listening()}},
		"more names":                    {[]name{a, b}, []int{listening()}},
		"a name twice":                  {[]name{a, a}, []int{listening(), listening()}},
	} {
		if _, err := receive(tt.names, tt.fds); err == nil {
			t.Errorf("%s: taken", what)
		}
		for _, fd := range tt.fds {
			if _, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil {
				t.Errorf("%s: descriptor %d is still open", what, fd)
			}
		}
	}
}

func FuzzMessage(f *testing.F) {
	for _, m := range []message{
		{Op: opHello, Version: version, Program: "sidecar", DataDir: "/d"},
		{Op: opAppend, Record: &audit.Record{Kind: audit.KindAdmin}},
		{Op: opDoors, Doors: []name{{"listen", "127.0.0.1:1"}}, Seq: 7},
	} {
		b, err := m.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte("\x00\x10\x00\x01"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := read(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := m.encode()
		if err != nil {
			return // it has grown by escapes
		}
		if _, err := read(bytes.NewReader(again)); err != nil {
			t.Errorf("what was read is not read again: %v", err)
		}
	})
}
