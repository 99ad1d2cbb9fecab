package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/netutil"
	"golang.org/x/sys/unix"
)

// longestSocket is the room for a path in sockaddr_un, without the final NUL.
const longestSocket = 107

// Admin serves the operator of one process on a Unix socket that only the
// process's own user and root can use.
type Admin struct {
	// Socket is the path. Its directory is made with mode 0700; one that exists
	// must belong to the process's user and be closed to others. Required.
	Socket string
	// Listener is served instead of opening Socket, and closed. Optional.
	Listener net.Listener
	// Ready answers /readyz. Required.
	Ready *Ready
	// Metrics answers /metrics. Without it the path is not found.
	Metrics http.Handler
	// Scrape serves Metrics alone, to whoever reaches it, and is closed. Optional.
	Scrape net.Listener
	// ConfigDump gives what /config_dump prints as JSON; secrets are masked as
	// by Masked.
	ConfigDump func() any
	// Level is read and changed by /loglevel.
	Level *slog.LevelVar
	// Drain starts the stop of the process (POST /drain). It must not block.
	Drain func()
	// Pprof answers /debug/pprof/, profiles of the process.
	Pprof bool
	// Extra adds handlers by pattern, such as "GET /proxies".
	Extra map[string]http.Handler
	// Log receives refused callers. Required.
	Log *slog.Logger
}

// Run serves until ctx ends, then closes every connection: an admin connection
// never holds a drain. It returns nil when ctx ended. As long as the socket
// answers, a service manager that wants to know is told that all is well.
func (a *Admin) Run(ctx context.Context) error {
	ln := a.Listener
	if ln == nil {
		var err error
		if ln, err = ListenPrivate(a.Socket, a.Log); err != nil {
			return err
		}
	}
	var beside sync.WaitGroup
	defer beside.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	beside.Go(func() { watchdog(ctx, a.Socket, a.Log) })
	if a.Scrape != nil {
		scrape := a.server(a.scrape())
		scrape.ReadTimeout, scrape.WriteTimeout, scrape.IdleTimeout = 10*time.Second, 30*time.Second, 3*time.Minute
		beside.Go(func() {
			if err := serveUntil(ctx, scrape, netutil.LimitListener(a.Scrape, maxScrapers)); err != nil {
				a.Log.Error("metrics are not served any more", "err", err)
			}
		})
	}
	if err := serveUntil(ctx, a.server(a.handler()), ln); err != nil {
		return fmt.Errorf("serve admin socket %s: %w", a.Socket, err)
	}
	return nil
}

func (a *Admin) server(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		MaxHeaderBytes:    16 << 10,
		ConnContext:       withCaller,
		ErrorLog:          slog.NewLogLogger(a.Log.Handler(), slog.LevelDebug),
	}
}

func serveUntil(ctx context.Context, srv *http.Server, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	defer ln.Close()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// maxScrapers bounds the connections of those who read metrics.
const maxScrapers = 64

// scrape is all that the port of metrics has.
func (a *Admin) scrape() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.Metrics)
	return mux
}

func (a *Admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok\n") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.Ready.Err(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		io.WriteString(w, "ok\n")
	})
	if a.Metrics != nil {
		mux.Handle("GET /metrics", a.Metrics)
	}
	if a.ConfigDump != nil {
		mux.HandleFunc("GET /config_dump", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			enc := json.NewEncoder(w)
			enc.SetIndent("", "  ")
			enc.Encode(Masked(a.ConfigDump()))
		})
	}
	if a.Level != nil {
		mux.HandleFunc("GET /loglevel", func(w http.ResponseWriter, _ *http.Request) {
			fmt.Fprintln(w, strings.ToLower(a.Level.Level().String()))
		})
		mux.HandleFunc("PUT /loglevel", a.setLevel)
	}
	if a.Drain != nil {
		mux.HandleFunc("POST /drain", func(w http.ResponseWriter, _ *http.Request) {
			a.Drain()
			w.WriteHeader(http.StatusAccepted)
			io.WriteString(w, "draining\n")
		})
	}
	if a.Pprof {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	for pattern, h := range maps.All(a.Extra) {
		mux.Handle(pattern, h)
	}
	return mux
}

// setLevel takes the level from the query (?level=debug) or from the body.
func (a *Admin) setLevel(w http.ResponseWriter, r *http.Request) {
	text := r.URL.Query().Get("level")
	if text == "" {
		body, err := io.ReadAll(io.LimitReader(r.Body, 64))
		if err != nil {
			http.Error(w, "read the body: "+err.Error(), http.StatusBadRequest)
			return
		}
		text = strings.TrimSpace(string(body))
	}
	level, err := ParseLevel(text)
	if text == "" {
		err = errors.New("log level is missing: want debug, info, warn or error")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	a.Level.Set(level)
	fmt.Fprintln(w, strings.ToLower(level.String()))
}

// ListenPrivate listens on a Unix socket of mode 0600 in a directory of mode
// 0700. Connections of other users than our own and root are closed before
// Accept returns them. The socket file of a dead process is replaced; that of
// a live one is an error.
func ListenPrivate(path string, log *slog.Logger) (*PrivateListener, error) {
	if len(path) > longestSocket {
		return nil, Hint(fmt.Errorf("listen on %s: the path has %d bytes, a Unix socket allows %d", path, len(path), longestSocket),
			"set a shorter run directory")
	}
	dir, err := privateDir(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	defer dir.Close()
	// The lock makes look, remove and bind one step: without it, of two
	// processes that start together one could remove the socket of the other.
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("listen on %s: lock directory: %w", path, err)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, cause(err))
	}
	return Private(ln, log), nil
}

// Private lets only our own user and root connect to a socket that ListenPrivate
// has opened in an earlier process.
func Private(ln *net.UnixListener, log *slog.Logger) *PrivateListener {
	return &PrivateListener{UnixListener: ln, log: log, uid: uint32(os.Geteuid())}
}

// privateDir makes dir, or checks that the one there is ours and closed.
func privateDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, Hint(fmt.Errorf("make directory %s: %w", dir, cause(err)), "set a run directory that this user may write")
	}
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", dir, cause(err))
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("look at directory %s: %w", dir, cause(err))
	}
	st, _ := info.Sys().(*syscall.Stat_t)
	switch {
	case st != nil && int(st.Uid) != os.Geteuid():
		err = Hint(fmt.Errorf("directory %s belongs to uid %d, not to uid %d", dir, st.Uid, os.Geteuid()), "set a run directory of its own")
	case info.Mode().Perm()&0o077 != 0:
		err = Hint(fmt.Errorf("directory %s has mode %04o, which lets others in", dir, info.Mode().Perm()),
			"chmod 0700 it if it is ours alone, else set a run directory of its own")
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// removeStale removes a socket file that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("listen on %s: %w", path, cause(err))
	}
	if info.Mode().Type() != fs.ModeSocket {
		return Hint(fmt.Errorf("listen on %s: a file is there that is not a socket", path), "move it away, or set another run directory")
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
	}
	// Only a refused connection proves that nobody listens: a full backlog or a
	// slow machine look different.
	if err == nil || !errors.Is(err, syscall.ECONNREFUSED) {
		return Hint(fmt.Errorf("listen on %s: already running: another process serves this socket", path), "stop it, or set another run directory")
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove the socket that a dead process left at %s: %w", path, cause(err))
	}
	return nil
}

// A PrivateListener lets in only its own user and root.
type PrivateListener struct {
	*net.UnixListener
	log *slog.Logger
	uid uint32
}

// Accept waits for a connection of one of them.
func (l *PrivateListener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		cred, err := peerCred(c)
		if err == nil && allowed(cred.Uid, l.uid) {
			return c, nil
		}
		c.Close()
		if err != nil {
			l.log.Warn("admin caller refused: its user is unknown", "err", err)
			continue
		}
		l.log.Warn("admin caller refused", "uid", cred.Uid, "pid", cred.Pid)
	}
}

// allowed says whether a caller with uid may use the socket of a process that
// runs as own.
func allowed(uid, own uint32) bool { return uid == own || uid == 0 }

func peerCred(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return nil, err
	}
	return cred, credErr
}

// callerKey is that of who has connected, in the context of a request.
type callerKey struct{}

func withCaller(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	cred, err := peerCred(u)
	if err != nil {
		return ctx
	}
	return context.WithValue(ctx, callerKey{}, fmt.Sprintf("uid %d pid %d", cred.Uid, cred.Pid))
}

// Caller is who asks on the admin socket, by user and process; empty when that is
// not known.
func Caller(r *http.Request) string {
	who, _ := r.Context().Value(callerKey{}).(string)
	return who
}

// AdminClient returns a client whose every request goes to the given admin
// socket, whatever host the URL names; use "http://admin". When nothing
// answers there, the error has the exit code Unreachable.
func AdminClient(socket string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			c, err := d.DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, Exit(Unreachable, Hint(fmt.Errorf("no process answers on %s: %w", socket, plainDial(err)),
					"start it, or name its socket"))
			}
			return c, nil
		},
		MaxIdleConns:       4,
		IdleConnTimeout:    30 * time.Second,
		DisableCompression: true,
	}}
}

// plainDial strips what net adds to a failed dial, which repeats the socket.
func plainDial(err error) error {
	var e syscall.Errno
	if errors.As(err, &e) {
		return e
	}
	return err
}
