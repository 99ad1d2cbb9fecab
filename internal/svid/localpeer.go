package svid

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"sallyport/internal/capture"
)

// securityHeader must be "true" in every request, so that a program that is
// tricked into fetching a URL cannot be tricked into this (SPIFFE Workload
// Endpoint section 3).
const securityHeader = "workload.spiffe.io"

// A localPeer is the process at the other end, as it was at accept.
type localPeer struct {
	credentials.CommonAuthInfo
	process capture.Process
	pidfd   *capture.Pidfd
	proven  <-chan struct{} // closed when the challenge was answered
}

// AuthType names the mechanism in gRPC's terms.
func (*localPeer) AuthType() string { return "local process" }

// check reports whether the process still is what it was at accept.
func (p *localPeer) check() error {
	now, err := capture.Inspect(p.process.PID)
	if err != nil {
		return err
	}
	if !p.process.Same(now) || !p.pidfd.Alive() {
		return errors.New("it ended, or became another program, user or cgroup")
	}
	return nil
}

// prove waits until the process has answered the challenge.
func (p *localPeer) prove(ctx context.Context, patience time.Duration) error {
	select {
	case <-p.proven:
		return nil
	default:
	}
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-p.proven:
		return nil
	case <-p.pidfd.Done():
		return capture.ErrNoProcess
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return errors.New("it did not answer the challenge")
	}
}

func peerOf(ctx context.Context) (*localPeer, error) {
	if p, ok := peer.FromContext(ctx); ok {
		if l, ok := p.AuthInfo.(*localPeer); ok {
			return l, nil
		}
	}
	return nil, status.Error(codes.Internal, "caller is not known")
}

// localPeers is the transport security of the Workload API: none on the wire,
// which is a Unix socket, and the kernel's word on who is there.
type localPeers struct{ w *WorkloadAPI }

func (l *localPeers) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, p, err := l.w.admit(c)
	if err != nil {
		c.Close()
		l.w.cfg.Log.Warn("workload API: connection refused", "error", err)
		return nil, nil, err
	}
	return conn, p, nil
}

func (*localPeers) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("local peers are for servers only")
}

func (*localPeers) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "local process"}
}

func (l *localPeers) Clone() credentials.TransportCredentials { return l }

func (*localPeers) OverrideServerName(string) error { return nil }

// admit names the process behind c and holds it. The pidfd comes first: while
// it is alive, what Inspect says of the pid is said of the opener.
func (w *WorkloadAPI) admit(c net.Conn) (net.Conn, *localPeer, error) {
	u, ok := c.(*capture.UnixPeer)
	if !ok {
		return nil, nil, errors.New("not a Unix socket that names its senders")
	}
	pid, uid := u.Cred().PID, u.Cred().UID
	if err := w.enter(pid, uid); err != nil {
		return nil, nil, err
	}
	p, err := hold(u)
	if err != nil {
		w.leave(pid, uid)
		return nil, nil, err
	}
	asked := challenge(c) // after hold has inspected the process
	p.proven = asked.proven
	conn := &heldConn{Conn: asked, free: sync.OnceFunc(func() {
		p.pidfd.Close()
		w.leave(pid, uid)
	})}
	go func() { // ends with the process or, through Close, with the connection
		<-p.pidfd.Done()
		conn.Close()
	}()
	return conn, p, nil
}

func hold(u *capture.UnixPeer) (*localPeer, error) {
	fd, err := u.Pidfd()
	if err != nil {
		return nil, err
	}
	proc, err := capture.Inspect(u.Cred().PID)
	if err == nil && !fd.Alive() {
		err = capture.ErrNoProcess
	}
	if err == nil && (proc.UID != u.Cred().UID || proc.GID != u.Cred().GID) {
		err = fmt.Errorf("pid %d changed its user or group since it connected", proc.PID)
	}
	if err != nil {
		fd.Close()
		return nil, err
	}
	return &localPeer{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		process:        proc, pidfd: fd,
	}, nil
}

// A heldConn lets go of its process when it is closed.
type heldConn struct {
	net.Conn
	free func()
}

func (c *heldConn) Close() error {
	c.free()
	return c.Conn.Close()
}

func (w *WorkloadAPI) enter(pid int, uid uint32) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns[pid] >= w.cfg.MaxConns {
		return fmt.Errorf("pid %d holds %d connections, the most it may", pid, w.cfg.MaxConns)
	}
	if w.total >= w.cfg.MaxTotal {
		return fmt.Errorf("%d connections are open, the most there may be", w.total)
	}
	if most := max(1, w.cfg.MaxTotal/2); w.users[uid] >= most {
		return fmt.Errorf("user %d holds %d connections, the most a user may", uid, most)
	}
	w.conns[pid]++
	w.users[uid]++
	w.total++
	return nil
}

func (w *WorkloadAPI) leave(pid int, uid uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.total--
	if w.users[uid]--; w.users[uid] <= 0 {
		delete(w.users, uid)
	}
	if w.conns[pid]--; w.conns[pid] <= 0 {
		delete(w.conns, pid)
	}
}

// begin counts a call of the caller and checks its security header. The
// function it gives ends the call.
func (w *WorkloadAPI) begin(ctx context.Context, method string) (end func(), err error) {
	md, _ := metadata.FromIncomingContext(ctx)
	h := md.Get(securityHeader)
	if (len(h) != 1 || h[0] != "true") && !strings.HasPrefix(method, sdsService) {
		return nil, status.Errorf(codes.InvalidArgument, "security header missing from request: set %s to true", securityHeader)
	}
	p, err := peerOf(ctx)
	if err != nil {
		return nil, err
	}
	pid := p.process.PID
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.streams[pid] >= w.cfg.MaxStreams {
		return nil, status.Errorf(codes.ResourceExhausted, "%d calls are open, the most one process may have", w.cfg.MaxStreams)
	}
	w.streams[pid]++
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.streams[pid]--; w.streams[pid] <= 0 {
			delete(w.streams, pid)
		}
	}, nil
}

func (w *WorkloadAPI) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, h grpc.UnaryHandler) (resp any, err error) {
	end, err := w.begin(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	defer end()
	defer w.recover(info.FullMethod, &err)
	return h(ctx, req)
}

func (w *WorkloadAPI) stream(srv any, s grpc.ServerStream, info *grpc.StreamServerInfo, h grpc.StreamHandler) (err error) {
	end, err := w.begin(s.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	defer end()
	defer w.recover(info.FullMethod, &err)
	return h(srv, s)
}

// recover keeps a mistake in one call from ending the process.
func (w *WorkloadAPI) recover(method string, err *error) {
	if v := recover(); v != nil {
		w.cfg.Log.Error("workload API: panic", "method", method, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		*err = status.Error(codes.Internal, "internal error")
	}
}
