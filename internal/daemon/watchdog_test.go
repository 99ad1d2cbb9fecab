package daemon

import (
	"context"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"testing"
)

// firstWrite closes the channel at the first log line.
type firstWrite chan struct{}

func (f firstWrite) Write(b []byte) (int, error) {
	select {
	case <-f:
	default:
		close(f)
	}
	return len(b), nil
}

func TestWatchdog(t *testing.T) {
	dir := shortDir(t)
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "n"))
	t.Setenv("WATCHDOG_USEC", "200000")
	t.Setenv("WATCHDOG_PID", "")
	admin, err := net.Listen("unix", filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}
	go srv.Serve(admin) //nolint:errcheck // ends with Close

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	complaint, done := make(firstWrite), make(chan struct{})
	go func() {
		defer close(done)
		watchdog(ctx, filepath.Join(dir, "a"), slog.New(slog.NewTextHandler(complaint, nil)))
	}()
	buf := make([]byte, 64)
	n, err := manager.Read(buf)
	if err != nil || string(buf[:n]) != "WATCHDOG=1" {
		t.Errorf("got %q %v", buf[:n], err)
	}
	if _, set := os.LookupEnv("WATCHDOG_PID"); set {
		t.Error("a process that is started would take itself not to be asked")
	}
	srv.Close()
	<-complaint
	cancel()
	<-done

	t.Setenv("WATCHDOG_USEC", "")
	watchdog(t.Context(), "nowhere", nil) // returns: nobody asks
}
