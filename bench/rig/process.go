package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// A Process is a program that a bench measures, and what it printed.
type Process struct {
	name string
	cmd  *exec.Cmd
	log  *os.File
	done chan struct{}

	admin    string        // its admin socket, of a program of ours
	patience time.Duration // how long its end may take
}

// Spawn starts a program whose output goes to a file of that name in dir. It
// dies with the bench.
func Spawn(dir, name string, argv ...string) (*Process, error) { return spawn(dir, name, nil, argv...) }

// spawn is Spawn with more in the environment.
func spawn(dir, name string, env []string, argv ...string) (*Process, error) {
	log, err := os.OpenFile(filepath.Join(dir, name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	p := &Process{name: name, log: log, cmd: exec.Command(argv[0], argv[1:]...), done: make(chan struct{}), patience: patience / 6}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", name, err), log.Close())
	}
	go func() {
		_ = p.cmd.Wait() // its log says why
		close(p.done)
	}()
	return p, nil
}

// Await waits until something listens on every address.
func (p *Process) Await(ctx context.Context, network string, addresses ...string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, a := range addresses {
		for {
			if c, err := net.Dial(network, a); err == nil {
				_ = c.Close()
				break
			}
			select {
			case <-p.done:
				return fmt.Errorf("%s ended at its start:\n%s", p.name, p.Log())
			case <-ctx.Done():
				return fmt.Errorf("%s does not listen on %s:\n%s", p.name, a, p.Log())
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	return nil
}

// Log is the end of what the process printed.
func (p *Process) Log() string {
	text, _ := os.ReadFile(p.log.Name())
	return string(text[max(0, len(text)-4000):])
}

// Stop ends the process: in order, or by force when that takes too long.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(p.patience):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	_ = p.log.Close()
}

// Kill ends the process as a crash does.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
	_ = p.log.Close()
}

// PIDs is the process alone, or with the workers that it has started.
func (p *Process) PIDs(workers bool) []int {
	own := p.cmd.Process.Pid
	out := []int{own}
	if !workers {
		return out
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", own))
	for _, t := range tasks {
		text, _ := os.ReadFile(t)
		for _, f := range strings.Fields(string(text)) {
			if n, err := strconv.Atoi(f); err == nil {
				out = append(out, n)
			}
		}
	}
	return out
}

// CPUOf is the time that processes have computed, in steps of 10 ms.
func CPUOf(pids ...int) (time.Duration, error) {
	var sum time.Duration
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, err
		}
		// The name in parentheses may hold blanks; utime and stime are the 12th
		// and 13th field after it.
		f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if len(f) < 13 {
			return 0, errors.New("read /proc stat: too few fields")
		}
		user, err1 := strconv.Atoi(f[11])
		system, err2 := strconv.Atoi(f[12])
		if err := errors.Join(err1, err2); err != nil {
			return 0, err
		}
		sum += time.Duration(user+system) * tick
	}
	return sum, nil
}

// RSSOf is the memory that processes have, MB of 10^6 bytes.
func RSSOf(pids ...int) (float64, error) {
	sum := 0.0
	for _, pid := range pids {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return 0, err
		}
		_, rest, ok := strings.Cut(string(text), "\nVmRSS:")
		if !ok {
			return 0, errors.New("read /proc status: no VmRSS")
		}
		n, err := strconv.Atoi(strings.Fields(rest)[0])
		if err != nil {
			return 0, err
		}
		sum += float64(n) * 1024 / 1e6
	}
	return sum, nil
}
