//go:build !linux

package main

import "syscall"

func demoSysProcAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
