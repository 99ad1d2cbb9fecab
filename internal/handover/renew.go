package handover

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"

	"sallyport/internal/daemon"
)

// Renew starts the program anew at each SIGUSR2, with the command line of this
// process, to take over from it. The program is looked for where this one was
// found when Renew was called: a newer one may lie there now. May says why it
// would be in vain. Renew returns nil when ctx ends; what it has started goes
// on.
func Renew(ctx context.Context, log *slog.Logger, may func() error) error {
	path, err := exec.LookPath(os.Args[0])
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		log.Warn("the own program is not found; SIGUSR2 will not start it anew", "err", err)
	}
	ch := make(chan os.Signal, 1)
	signal.Notify(ch, syscall.SIGUSR2)
	defer signal.Stop(ch)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ch:
		}
		err := may()
		if err == nil {
			err = start(path, log)
		}
		if err != nil {
			log.Error("not started anew, this process serves on", "err", err)
		}
	}
}

func start(path string, log *slog.Logger) error {
	args := slices.Clone(os.Args[1:])
	if flag := "--" + daemon.TakeoverFlag; !slices.Contains(args, flag) {
		args = append(args, flag)
	}
	cmd := exec.Command(path, args...) // it must not end with this process
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", path, err)
	}
	log.Info("started anew, to take over", "program", path, "pid", cmd.Process.Pid)
	go func() {
		if err := cmd.Wait(); err != nil {
			log.Error("the process that was to take over has ended", "pid", cmd.Process.Pid, "err", err)
		}
	}()
	return nil
}
