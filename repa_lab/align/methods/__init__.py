"""Methods beyond REPA and U-REPA: a file for each, and the settings of all of them in ``settings``, without torch."""
