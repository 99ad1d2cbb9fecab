package svid

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"sallyport/internal/capture"
)

// receive takes the connection that the other process gave away.
func receive(t *testing.T, sock int) net.Conn {
	t.Helper()
	oob, b := make([]byte, 128), make([]byte, 1)
	_, n, _, _, err := unix.Recvmsg(sock, b, oob, 0)
	if err != nil {
		t.Fatal(err)
	}
	m, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(m) != 1 {
		t.Fatal(m, err)
	}
	fds, err := unix.ParseUnixRights(&m[0])
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[0]), "stolen")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// The attack of a program that opens a connection, becomes the rightful
// program, and leaves the connection with somebody else.
func TestHandedOverConnectionGetsNoKey(t *testing.T) {
	s := serve(t, entitled("entry/a"), nil, id("/a"))
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sp[0])
	theirs := os.NewFile(uintptr(sp[1]), "pair")
	start(t, "hand-over", []*os.File{theirs}, s.path)
	theirs.Close()
	conn := receive(t, sp[0])
	var once atomic.Bool
	cc, err := grpc.NewClient("passthrough:///x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			if once.Swap(true) {
				return nil, errors.New("one connection only")
			}
			return conn, nil
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	stream, err := workload.NewSpiffeWorkloadAPIClient(cc).FetchX509SVID(header(t), &workload.X509SVIDRequest{})
	if err == nil {
		var r *workload.X509SVIDResponse
		if r, err = stream.Recv(); err == nil {
			t.Fatalf("the thief holds the key of %s", r.Svids[0].SpiffeId)
		}
	}
}

// A program writes its request ahead, gives the connection away and becomes
// the rightful program, all before the server looks: pid, program and start
// time are right, and the thief only reads.
func TestRequestWrittenAheadGetsNoKey(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	var req, head bytes.Buffer
	enc := hpack.NewEncoder(&head)
	for _, h := range [][2]string{{":method", "POST"}, {":scheme", "http"}, {":path", workload.SpiffeWorkloadAPI_FetchX509SVID_FullMethodName},
		{":authority", "x"}, {"content-type", "application/grpc"}, {"te", "trailers"}, {securityHeader, "true"}} {
		enc.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
	}
	req.WriteString(http2.ClientPreface)
	fr := http2.NewFramer(&req, nil)
	fr.WriteSettings()
	fr.WriteSettingsAck()
	fr.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: head.Bytes(), EndHeaders: true})
	fr.WriteData(1, true, make([]byte, 5))

	ca := newCA(t, td)
	a := entitled("entry/a")
	api, err := NewWorkloadAPI(WorkloadConfig{Source: ca.source(id("/a")), Attest: a, Log: slog.New(slog.DiscardHandler), patience: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := capture.ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	sp, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(sp[0])
	theirs := os.NewFile(uintptr(sp[1]), "pair")
	// The preface holds no NUL, but frames do: an argument cannot carry them.
	c, _ := start(t, "write-ahead", []*os.File{theirs}, path, hex.EncodeToString(req.Bytes()), sleep, "600")
	theirs.Close()
	conn := receive(t, sp[0])
	for { // until the process is the rightful program
		p, err := capture.Inspect(c.Process.Pid)
		if err == nil && filepath.Base(p.ExePath) != filepath.Base(os.Args[0]) {
			break
		}
		runtime.Gosched()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- api.Serve(ctx, l) }()
	defer func() { cancel(); <-done }()
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	from := http2.NewFramer(io.Discard, conn)
	for {
		f, err := from.ReadFrame()
		if err != nil {
			t.Fatalf("before an answer: %v", err)
		}
		if f.Header().Type == http2.FrameData && f.Header().Length > 5 {
			t.Fatalf("the thief read an answer of %d bytes", f.Header().Length)
		}
		if f.Header().Type == http2.FrameHeaders && f.Header().Flags.Has(http2.FlagHeadersEndStream) {
			break // refused
		}
	}
	if a.asked.Load() != 0 {
		t.Error("the caller was attested although it never answered")
	}
}

// accept gives what the server knows of one process that connected.
func accept(t *testing.T, role string, args ...string) (*localPeer, net.Conn, *exec.Cmd, io.WriteCloser) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := capture.ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c, in := start(t, role, nil, append([]string{path}, args...)...)
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	w, err := NewWorkloadAPI(WorkloadConfig{Source: NewSource(), Attest: entitled(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	held, p, err := w.admit(conn)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { held.Close() })
	if err := p.check(); err != nil {
		t.Fatalf("the process that connected: %v", err)
	}
	return p, held, c, in
}

func TestProcessThatBecomesAnotherProgramIsRefused(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	p, _, _, in := accept(t, "exec", sleep, "600")
	io.WriteString(in, "\n")
	for { // until exec has happened
		now, err := capture.Inspect(p.process.PID)
		if err == nil && now.ExeInode != p.process.ExeInode {
			break
		}
		runtime.Gosched()
	}
	if err := p.check(); err == nil {
		t.Error("another program under the same pid was accepted")
	}
}

func TestReusedPIDIsRefused(t *testing.T) {
	p, _, _, _ := accept(t, "wait")
	p.process.Start-- // what it would be had the pid changed hands
	if err := p.check(); err == nil {
		t.Error("a process with another start time was accepted")
	}
}

func TestExitClosesTheConnection(t *testing.T) {
	p, conn, c, _ := accept(t, "wait")
	done := p.pidfd.Done()
	c.Process.Kill()
	c.Wait()
	<-done
	if _, err := io.ReadAll(conn); err != nil && !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
	if err := p.check(); err == nil {
		t.Error("a process that has ended was accepted")
	}
}
