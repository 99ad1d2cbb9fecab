package daemon

import (
	"cmp"
	"context"
	"fmt"
	"time"
)

// LogConfig is the section of a configuration about logs for the operator;
// decisions go to the audit log.
type LogConfig struct {
	// Level is debug, info, warn or error. Default info.
	Level string `yaml:"level"`
}

// Validate checks the level.
func (l LogConfig) Validate() error {
	if _, err := ParseLevel(l.Level); err != nil {
		return fmt.Errorf("log.level: %w", err)
	}
	return nil
}

// DrainConfig is the section that bounds an orderly stop.
type DrainConfig struct {
	// Wait is how long a process stays open after it says "not ready".
	Wait time.Duration `yaml:"wait"`
	// Timeout bounds what is in flight. Default 25 s.
	Timeout time.Duration `yaml:"timeout"`
}

// WithDefaults fills what was left out.
func (d DrainConfig) WithDefaults() DrainConfig {
	d.Timeout = cmp.Or(d.Timeout, 25*time.Second)
	return d
}

// Pause waits for d, or until now ends.
func Pause(now context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-now.Done():
	case <-t.C:
	}
}
