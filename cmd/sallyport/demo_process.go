package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"sallyport/internal/daemon"
)

// A process is one child of the demo. Its standard error goes to a log file;
// its standard output is read as events.
type process struct {
	name string
	argv []string
	env  []string
	log  string

	cmd  *exec.Cmd
	done chan struct{} // closed when the process has been waited for
	err  error         // of Wait; read after done
}

// start runs the program. Events on its standard output go to sink.
func (p *process) start(sink func(demoEvent)) error {
	logFile, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close() // the child has its own copy
	p.cmd = exec.Command(p.argv[0], p.argv[1:]...)
	p.cmd.Env = p.env
	p.cmd.Stderr = logFile
	p.cmd.Dir = filepath.Dir(p.log)
	// A group of its own: a Ctrl-C in the terminal reaches the demo alone,
	// which then stops its children in order. The kernel kills them if the
	// demo itself is killed.
	p.cmd.SysProcAttr = demoSysProcAttr()
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.done = make(chan struct{})
	go func() {
		defer close(p.done)
		readEvents(out, sink)
		p.err = p.cmd.Wait()
	}()
	return nil
}

func readEvents(r io.Reader, sink func(demoEvent)) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		var e demoEvent
		if json.Unmarshal(sc.Bytes(), &e) == nil && e.Probe != "" {
			sink(e)
		}
	}
	_, _ = io.Copy(io.Discard, r) // a line too long must not block the child
}

// ready asks the program behind an admin socket whether it is.
func ready(ctx context.Context, socket string) error {
	c := daemon.AdminClient(socket)
	defer c.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://admin/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
		return fmt.Errorf("not ready: %s", bytes.TrimSpace(b))
	}
	return nil
}

// running reports whether the process has not ended yet.
func (p *process) running() bool {
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the process as a crash would.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// stop asks the process to end and insists after the grace period.
func (p *process) stop(grace time.Duration) error {
	if p.cmd == nil || p.cmd.Process == nil || p.done == nil {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.done:
		return nil
	case <-t.C:
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		return fmt.Errorf("%s had to be killed: it did not end within %s of SIGTERM", p.name, grace)
	}
}

// lastWords returns the end of the process's log, for an error message.
func (p *process) lastWords() string {
	b, err := os.ReadFile(p.log)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err.Error()
	}
	return string(b[max(0, len(b)-1200):])
}
